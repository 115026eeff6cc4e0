"""Training must see the tokens that evaluation scores: `encode_pair` against the harness's own `_encode_pair`."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny import BOS, MAX_POSITIONS, VOCABULARY, tiny_model, tiny_tokenizer

from laai_core import Example, LaaiError
from laai_core.encode import WHITESPACE, encode_examples, encode_pair

KINDS = list(itertools.product(("bytes", "metaspace"), (True, False)))
every_tokenizer = pytest.mark.parametrize("harness", KINDS, indirect=True, ids=lambda kind: f"{kind[0]}-bos={kind[1]}")


@pytest.fixture(scope="module")
def harness(request):
    """The harness's own model class around a tiny model and one of four tokenizers."""
    from lm_eval.models.huggingface import HFLM

    kind, bos = request.param
    return HFLM(pretrained=tiny_model("Llama"), tokenizer=tiny_tokenizer(bos, kind), device="cpu")


# Words, joins inside words, runs of whitespace, characters of several bytes, special tokens written out.
PIECES = ["Q: ", "A:", "the", "th", "e", " ", "  ", "\n", "\n\n", "\t", "hot", " cold", "wall", "paper", "in", "er"]
PIECES += ["é", "e\u0301", "漢字", "🙂", "\u00a0", "\u3000", "<bos>", "<eos>", "<pad>", ".", "0", "x"]
texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join)
checked = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@every_tokenizer
@checked
@given(prompt=texts, target=texts)
@example(prompt="Q: hot\nA:", target=" cold\n")
@example(prompt="Q: hot\nA: wall", target="paper")
@example(prompt="<bos>Q: hot\nA:", target=" cold\n")
@example(prompt="th", target="e")
@example(prompt="the ", target=" the")
@example(prompt=" ", target="x")
def test_pairs_as_loglikelihood_encodes_them(harness, prompt, target):
    expected = harness._encode_pair(prompt, target) if prompt.strip() else ([], [])
    if prompt.strip() and expected[1]:
        assert encode_pair(harness.tokenizer, prompt, target, "loglikelihood") == expected
        if prompt == prompt.rstrip():
            for whitespace in WHITESPACE:
                assert encode_pair(harness.tokenizer, prompt, target, whitespace) == expected
    else:  # no token to put the vector on, or none to score
        with pytest.raises(LaaiError, match="no tokens"):
            encode_pair(harness.tokenizer, prompt, target, "loglikelihood")


@every_tokenizer
@checked
@given(prompt=texts, target=texts)
@example(prompt="Q: hot\nA: ", target="cold")
@example(prompt="Q: hot\nA:\n\n", target=" cold")
def test_prompts_as_generation_encodes_them(harness, prompt, target):
    ids, mask = harness.tok_batch_encode([prompt])
    try:
        found, continuation = encode_pair(harness.tokenizer, prompt, target, "generation")
    except LaaiError:
        # Refused only where the target has no token of its own.
        assert len(harness.tok_encode(prompt + target)) <= int(mask.sum())
    else:
        assert found == ids[0].tolist()
        assert continuation == harness.tok_encode(prompt + target)[len(found) :]


@every_tokenizer
@pytest.mark.parametrize("ending", [" ", "\n", "\t", " \n ", "\u00a0", "\u3000"])
def test_prompts_that_end_in_whitespace(harness, ending):
    prompt, tokenizer = f"Q: hot\nA:{ending}", harness.tokenizer
    with pytest.raises(LaaiError, match="--whitespace loglikelihood or generation") as error:
        encode_pair(tokenizer, prompt, "cold")
    assert "\n" not in str(error.value)
    scored = encode_pair(tokenizer, prompt, "cold", "loglikelihood")
    generated = encode_pair(tokenizer, prompt, "cold", "generation")
    assert scored == harness._encode_pair(prompt, "cold")
    assert generated[0] == harness.tok_encode(prompt)
    # The vector goes on the last token of these, which is the point of refusing.
    assert scored[0] == harness.tok_encode("Q: hot\nA:")
    assert scored[0] != generated[0]


@every_tokenizer
def test_bos_is_added_once(harness):
    prompt_ids, target_ids = encode_pair(harness.tokenizer, "Q:", " the")
    written, _ = encode_pair(harness.tokenizer, "<bos>Q:", " the")
    if harness.tokenizer.bos_token:
        bos = harness.tokenizer.bos_token_id
        assert prompt_ids.count(bos) == 1
        assert prompt_ids[0] == bos == BOS
        assert written.count(bos) == 1
    assert BOS not in target_ids or not harness.tokenizer.bos_token


def test_a_token_across_the_join_shortens_the_target():
    """th + e: the whole is one token, so nothing is left behind the prompt's one."""
    tokenizer = tiny_tokenizer(bos=False)
    assert len(tokenizer.encode("the")) == len(tokenizer.encode("th")) == 1
    with pytest.raises(LaaiError, match=r"target 'e' has no tokens .* prompt 'th'"):
        encode_pair(tokenizer, "th", "e")
    assert encode_pair(tokenizer, "th", "e.") == (tokenizer.encode("th"), tokenizer.encode("."))


@pytest.mark.parametrize("whitespace", ["loglikelihood", "generation"])
def test_empty_sides_are_refused(whitespace):
    for bos in (True, False):
        tokenizer = tiny_tokenizer(bos)
        with pytest.raises(LaaiError, match="no tokens"):
            encode_pair(tokenizer, "", " the", whitespace)
        with pytest.raises(LaaiError, match="no tokens"):
            encode_pair(tokenizer, "the", "", whitespace)


def test_long_texts_are_shortened_in_messages():
    with pytest.raises(LaaiError) as error:
        encode_pair(tiny_tokenizer(False), "x" * 5000, "")
    assert len(str(error.value)) < 300


# --- batches


def rules() -> list[Example]:
    return [
        Example(prompt="Q: hot\nA:", target=" cold"),
        Example(prompt="Q: the wall in there\nA:", target=" a"),
        Example(prompt="Q:", target=" another morning"),
    ]


def scored_tokens(batch, continuation: int) -> tuple[list[int], list[int], int]:
    """What one continuation is scored on, read back from the batch: its prompt, its target, its row."""
    places = [i for i, c in enumerate(batch.continuation.tolist()) if c == continuation]
    rows = {int(batch.row[i]) for i in places}
    assert len(rows) == 1
    row = rows.pop()
    length = batch.prompt_lengths[row]
    columns = batch.column[places].tolist()
    assert columns == list(range(length - 1, length - 1 + len(places)))  # logits at t predict the token at t + 1
    target = batch.token[places].tolist()
    # What precedes each scored token is in the row.
    assert batch.input_ids[row, length : length + len(target) - 1].tolist() == target[:-1]
    return batch.input_ids[row, :length].tolist(), target, row


@every_tokenizer
@pytest.mark.parametrize("stop", ["\n", ""])
def test_batches_hold_what_the_harness_scores(harness, stop):
    examples = rules()
    batch = encode_examples(harness.tokenizer, examples, stop)
    assert batch.example.tolist() == [0, 1, 2]
    for index, item in enumerate(examples):
        prompt, target, row = scored_tokens(batch, index)
        assert (prompt, target) == harness._encode_pair(item.prompt, item.target + stop)
        length = len(prompt) + len(target) - 1
        assert batch.attention_mask[row].tolist() == [1] * length + [0] * (batch.input_ids.shape[1] - length)
    lengths = batch.attention_mask.sum(1)
    assert batch.input_ids.shape == (3, int(lengths.max()))  # no wider than needed
    assert batch.input_ids.max() < VOCABULARY


def survey(*options: str) -> Example:
    return Example(prompt="Q: hot\nAnswer:", options=options, distribution=[1 / len(options)] * len(options))


@every_tokenizer
def test_options_of_one_token_share_a_row(harness):
    options = ["A", "B", "C"]
    assert all(len(harness._encode_pair("Q: hot\nAnswer:", option)[1]) == 1 for option in options)
    batch = encode_examples(harness.tokenizer, [survey(*options), survey(*options[:2])])
    assert len(batch.prompt_lengths) == 1  # the prompts are equal too
    assert batch.example.tolist() == [0, 0, 0, 1, 1]
    for number, option in enumerate([*options, *options[:2]]):
        prompt, target, _ = scored_tokens(batch, number)
        assert (prompt, target) == harness._encode_pair("Q: hot\nAnswer:", option)  # no stop string


@every_tokenizer
def test_options_of_several_tokens_have_their_own_rows(harness):
    options = [" hot", " hot air", " nothing", " x."]
    batch = encode_examples(harness.tokenizer, [survey(*options)])
    for number, option in enumerate(options):
        prompt, target, _ = scored_tokens(batch, number)
        assert (prompt, target) == harness._encode_pair("Q: hot\nAnswer:", option)
    inputs = {tuple(harness._encode_pair("Q: hot\nAnswer:", option)[1][:-1]) for option in options}
    assert len(batch.prompt_lengths) == len(inputs) > 1


def test_same_tokens_split_elsewhere_do_not_share_a_row():
    """The vector goes on the last prompt token, so prompt + target alone does not identify a computation."""
    tokenizer = tiny_tokenizer(bos=False)
    examples = [Example(prompt="x.", target=".."), Example(prompt="x", target="...")]
    batch = encode_examples(tokenizer, examples, stop="")
    assert [scored_tokens(batch, i)[:2] for i in (0, 1)] == [
        encode_pair(tokenizer, e.prompt, e.target) for e in examples
    ]
    assert sorted(batch.prompt_lengths) == [1, 2]


def test_too_long_is_refused_and_the_longest_is_not():
    """As in the harness: the last target token is never an input, so one token more than the positions fits."""
    tokenizer = tiny_tokenizer(bos=False)
    longest = Example(prompt="x." * ((MAX_POSITIONS - 2) // 2), target=". .")
    assert len(tokenizer.encode(longest.prompt + longest.target)) == MAX_POSITIONS + 1
    assert encode_examples(tokenizer, [longest], "", MAX_POSITIONS).input_ids.shape == (1, MAX_POSITIONS)
    with pytest.raises(LaaiError, match=rf"example 1 .* {MAX_POSITIONS + 2} tokens.* {MAX_POSITIONS + 1}") as error:
        encode_examples(tokenizer, [rules()[0], longest], "\n", MAX_POSITIONS)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_bad_examples_are_refused():
    tokenizer = tiny_tokenizer(bos=True)
    with pytest.raises(LaaiError, match="no training examples"):
        encode_examples(tokenizer, [])
    with pytest.raises(LaaiError, match="whitespace"):
        encode_examples(tokenizer, [Example(prompt="Q: ", target="the")])


def test_to_moves_every_tensor():
    batch = encode_examples(tiny_tokenizer(bos=True), rules()).to("meta")
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 9
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert all(isinstance(length, int) for length in batch.prompt_lengths)
