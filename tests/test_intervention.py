"""The value type: construction, its algebra, and what it refuses."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laai_core import Intervention, LaaiError
from laai_core.words import OPERATIONS, POSITIONS, SITES

numbers = st.floats(-8, 8, width=16)
scales = st.floats(-4, 4, width=16)


@st.composite
def interventions(draw) -> Intervention:
    """At heads, two heads of two, one to three layers out of four."""
    layers = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True))
    rows = st.lists(numbers, min_size=4, max_size=4)
    return Intervention({i: torch.tensor(draw(rows)).view(2, 2) for i in layers}, scale=draw(scales))


def applied(iv: Intervention) -> dict[int, list[float]]:
    """What is added at each layer, as plain numbers: the meaning that the algebra must respect."""
    return {i: [iv.scale * x for x in iv.vector(i).flatten().tolist()] for i in iv.layers}


def assert_same(found: dict[int, list[float]], expected: dict[int, list[float]]) -> None:
    assert found.keys() == expected.keys()
    for layer in expected:
        assert found[layer] == pytest.approx(expected[layer], abs=1e-4, rel=1e-5)


def combined(a: float, left: Intervention, b: float, right: Intervention) -> dict[int, list[float]]:
    """a * left + b * right by the definition, absent layers counting as zero."""
    x, y = applied(left), applied(right)
    zero = [0.0] * 4
    return {i: [a * p + b * q for p, q in zip(x.get(i, zero), y.get(i, zero), strict=True)] for i in sorted({*x, *y})}


# --- construction


def test_flat_and_grouped_vectors_are_the_same():
    flat = Intervention({1: torch.arange(12.0)}, head_dim=4)
    grouped = Intervention({1: torch.arange(12.0).view(3, 4)})
    assert flat.vector(1).shape == (3, 4)
    assert torch.equal(flat.vector(1), grouped.vector(1))
    assert flat.vector(1)[2].tolist() == [8, 9, 10, 11]


def test_defaults_and_attributes():
    iv = Intervention({5: torch.ones(2, 2), 1: torch.ones(3, 2)}, metadata={"task": "antonym"})
    assert (iv.site, iv.position, iv.scale, iv.operation) == ("heads", "last", 1.0, "add")
    assert iv.layers == [1, 5]
    assert iv.metadata == {"task": "antonym"}


@pytest.mark.parametrize("site", ["residual", "mlp"])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_flat_sites(site, position, operation):
    iv = Intervention({0: torch.arange(5.0)}, site, position, scale=0.5, operation=operation)
    assert iv.vector(0).tolist() == [0, 1, 2, 3, 4]  # unscaled
    assert (iv.site, iv.position, iv.scale, iv.operation) == (site, position, 0.5, operation)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_vectors_become_float32(dtype):
    iv = Intervention({0: torch.tensor([[0.5, 1.5]], dtype=dtype, requires_grad=True)})
    assert iv.vector(0).dtype == torch.float32
    assert not iv.vector(0).requires_grad
    assert iv.vector(0).tolist() == [[0.5, 1.5]]


def test_known_words():
    assert (SITES, POSITIONS, OPERATIONS) == (
        ("heads", "residual", "mlp"),
        ("last", "generated", "all"),
        ("add", "icv"),
    )


V = torch.ones(2, 2)
V_ALONE = Intervention({0: V})
BAD_CONSTRUCTIONS = {
    "site": (dict(vectors={0: V}, site="attention"), "attention"),
    "position": (dict(vectors={0: V}, position="first"), "first"),
    "operation": (dict(vectors={0: V}, operation="mul"), "mul"),
    "scale nan": (dict(vectors={0: V}, scale=math.nan), "scale"),
    "scale infinite": (dict(vectors={0: V}, scale=math.inf), "scale"),
    "scale beyond floats": (dict(vectors={0: V}, scale=10**400), "scale"),
    "no layer": (dict(vectors={}), "layer"),
    "flat without head_dim": (dict(vectors={0: torch.ones(4)}), "head_dim"),
    "width no multiple of head_dim": (dict(vectors={0: torch.ones(5)}, head_dim=2), "5"),
    "head_dim zero": (dict(vectors={0: torch.ones(4)}, head_dim=0), "0"),
    "head_dim contradicts": (dict(vectors={0: V}, head_dim=3), "3"),
    "three dimensions": (dict(vectors={0: torch.ones(2, 2, 2)}), "[2, 2, 2]"),
    "scalar": (dict(vectors={0: torch.tensor(1.0)}), "[]"),
    "two dimensions at residual": (dict(vectors={0: V}, site="residual"), "[2, 2]"),
    "nan": (dict(vectors={0: torch.tensor([[0.0, math.nan]])}), "NaN"),
    "infinite": (dict(vectors={0: torch.tensor([[0.0, -math.inf]])}), "NaN or infinite"),
    "beyond float32": (dict(vectors={0: torch.tensor([[1e300]], dtype=torch.float64)}), "infinite"),
    "empty": (dict(vectors={0: torch.ones(0, 4)}), "empty"),
    "integers": (dict(vectors={0: torch.ones(2, 2, dtype=torch.long)}), "int64"),
    "complex": (dict(vectors={0: torch.ones(2, 2, dtype=torch.complex64)}), "complex64"),
    "a list": (dict(vectors={0: [[1.0]]}), "list"),
    "layer as text": (dict(vectors={"0": V}), "'0'"),
    "layer as bool": (dict(vectors={True: V}), "True"),
    "layers of two kinds": (dict(vectors={"4": V, 3: V}), "'4'"),
    "no mapping": (dict(vectors=[V]), "vectors are a list: expected {layer: tensor}"),
    "head_dim a fraction": (dict(vectors={0: torch.ones(4)}, head_dim=2.0), "head_dim is 2.0"),
    "scale as text": (dict(vectors={0: V}, scale="2"), "scale is '2'"),
}


@pytest.mark.parametrize("case", BAD_CONSTRUCTIONS)
def test_refused_constructions(case):
    arguments, word = BAD_CONSTRUCTIONS[case]
    with pytest.raises(LaaiError) as error:
        Intervention(**arguments)
    assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_layer_names_the_known_ones():
    with pytest.raises(LaaiError, match=r"no layer 3.*\[1, 2\]"):
        Intervention({1: V, 2: V}).vector(3)


def test_numbers_of_numpy_are_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    plain = Intervention({1: torch.ones(4)}, head_dim=2, scale=0.5)
    of_numpy = Intervention({np.int64(1): torch.ones(4)}, head_dim=np.int64(2), scale=np.float32(0.5))
    assert of_numpy.layers == [1] and of_numpy.sha256 == plain.sha256
    for half in (np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor([0.5]).double()):
        assert (of_numpy * half).sha256 == (half * of_numpy).sha256 == (plain * 0.5).sha256
        assert (of_numpy / half).sha256 == (plain * 2).sha256
        assert of_numpy.rescaled(half).scale == 0.25
    of_numpy.save("~/vector.safetensors")
    assert Intervention.load(tmp_path / "vector.safetensors").sha256 == plain.sha256


# --- immutability


def test_changing_the_source_changes_nothing():
    source = torch.ones(2, 2)
    facts = {"training": {"l1": 0.5}}
    iv = Intervention({0: source}, metadata=facts)
    before = iv.sha256
    source.zero_()
    facts["training"]["l1"] = 2.0
    facts["task"] = "other"
    assert iv.vector(0).tolist() == [[1, 1], [1, 1]]
    assert iv.metadata == {"training": {"l1": 0.5}}
    assert iv.sha256 == before


def test_changing_what_vector_returned_changes_nothing():
    iv = Intervention({0: torch.ones(2, 2)})
    iv.vector(0).mul_(7)
    assert iv.vector(0).tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("name", ["site", "position", "operation", "scale", "metadata", "vectors"])
def test_attributes_are_not_set(name):
    class Named(Intervention):
        def __init__(self, vectors, **options):
            super().__init__(vectors, **options)
            self.nickname = "mine"

    with pytest.raises(LaaiError, match="is not to be changed"):
        setattr(Named({0: V}), "site" if name == "vectors" else name, None)
    iv = Intervention({0: V}, metadata={"task": "x"})
    before = iv.sha256
    with pytest.raises(LaaiError, match=f"{name} is not to be changed: {'rescaled' if name == 'scale' else 'make'}"):
        setattr(iv, name, math.nan)
    assert iv.sha256 == before
    iv.metadata["task"] = "y"
    assert iv.sha256 != before


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda iv: pickle.loads(pickle.dumps(iv))])
def test_copies_are_equal(copied):
    iv = Intervention({0: V}, "heads", "all", scale=0.5, metadata={"task": "x"})
    assert copied(iv).sha256 == iv.sha256


def test_arithmetic_shares_no_memory():
    a = Intervention({0: torch.ones(2, 2)}, metadata={"training": {"l1": 1}})
    before = a.sha256
    for b in (1.0 * a, a + a, -a, a / 1, sum([a]), a.rescaled(1.0)):
        b._vectors[0].fill_(9)
        b.metadata.setdefault("training", {})["l1"] = 9
    assert a.sha256 == before


# --- algebra


@given(interventions(), interventions())
def test_sum_is_the_sum_of_what_is_applied(a, b):
    assert_same(applied(a + b), combined(1, a, 1, b))


@given(interventions(), interventions(), scales)
def test_linear_combinations(a, b, k):
    assert_same(applied(2 * a - b), combined(2, a, -1, b))
    assert_same(applied(k * (a + b)), combined(k, a, k, b))
    assert_same(applied(k * a + k * b), combined(k, a, k, b))
    assert_same(applied((a + b) / 4), combined(0.25, a, 0.25, b))


@given(interventions(), interventions())
def test_laws_that_hold_to_the_bit(a, b):
    sums = ((a + b, b + a), (a - b, a + -b), (a + a, 2 * a), (sum([a, b]), a + b))
    for left, right in (*sums, (-1 * -a, 1 * a), (2 * a, a * 2), (a / 2, 0.5 * a)):
        assert left.layers == right.layers
        assert left.scale == right.scale
        assert all(torch.equal(left.vector(i), right.vector(i)) for i in left.layers)


@given(interventions(), interventions(), interventions())
def test_sum_is_associative(a, b, c):
    assert_same(applied((a + b) + c), applied(a + (b + c)))


@given(interventions())
def test_scales_are_folded(a):
    for b in (1 * a, -a, a + a):
        assert b.scale == 1.0
    assert_same(applied(1 * a), applied(a))
    assert all(not (0 * a).vector(i).any() for i in a.layers)


@given(interventions(), scales)
def test_rescaled_keeps_the_vectors(a, factor):
    b = a.rescaled(factor)
    assert b.scale == a.scale * factor
    assert all(torch.equal(a.vector(i), b.vector(i)) for i in a.layers)


def test_union_of_layers():
    a = Intervention({0: torch.tensor([[1.0, 2.0]]), 2: torch.tensor([[3.0, 4.0]])}, scale=2)
    b = Intervention({1: torch.tensor([[5.0, 6.0]]), 2: torch.tensor([[7.0, 8.0]])}, scale=-1)
    total = a + b
    assert total.layers == [0, 1, 2]
    assert total.vector(0).tolist() == [[2, 4]]
    assert total.vector(1).tolist() == [[-5, -6]]
    assert total.vector(2).tolist() == [[-1, 0]]


def test_other_attributes_survive():
    a = Intervention({0: torch.ones(3)}, "mlp", "generated", scale=2)
    for b in (a + a, 2 * a, -a, a.rescaled(3)):
        assert (b.site, b.position, b.operation) == ("mlp", "generated", "add")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Intervention({0: torch.ones(4)}, "mlp"), ["site", "residual", "mlp"]),
        (Intervention({0: torch.ones(4)}, "residual", "all"), ["position", "last", "all"]),
        (Intervention({0: torch.ones(4)}, "residual", operation="icv"), ["operation", "add", "icv"]),
        (Intervention({0: torch.ones(5)}, "residual"), ["shape", "(4,)", "(5,)", "layer 0"]),
    ],
)
def test_sums_of_different_kinds_are_refused(other, words):
    a = Intervention({0: torch.ones(4)}, "residual")
    with pytest.raises(LaaiError) as error:
        a + other
    assert all(word in str(error.value) for word in words)
    with pytest.raises(LaaiError):
        a - other


def test_same_width_in_other_heads_is_refused():
    with pytest.raises(LaaiError, match="shape"):
        Intervention({0: torch.ones(2, 6)}) + Intervention({0: torch.ones(3, 4)})


@pytest.mark.parametrize("combine", [lambda a: 2 * a, lambda a: -a, lambda a: a + a, lambda a: a - a])
def test_icv_is_not_linear(combine):
    a = Intervention({0: torch.ones(4)}, "mlp", operation="icv")
    with pytest.raises(LaaiError, match="not linear"):
        combine(a)
    assert a.rescaled(0.5).scale == 0.5  # its step may still be changed


NO_NUMBERS = [lambda a: a * "2", lambda a: a / "2", lambda a: a + 1, lambda a: 1 + a, lambda a: 0.0 + a]
NO_NUMBERS += [lambda a: a * 1j, lambda a: a * np.complex64(1j), lambda a: a * np.complex128(1j)]
NO_NUMBERS += [lambda a: False + a, lambda a: 1 - a, lambda a: 1 / a, lambda a: a * a, lambda a: a / a]


@pytest.mark.parametrize("combine", NO_NUMBERS)
def test_other_operands_are_type_errors(combine):
    with pytest.raises(TypeError):
        combine(Intervention({0: V}))


def test_overflow_is_refused():
    a = Intervention({0: torch.full((1, 2), 3e38)})
    for combine in (lambda: a + a, lambda: 10 * a, lambda: a / 0.1):
        with pytest.raises(LaaiError, match="infinite"):
            combine()


@pytest.mark.parametrize("factor", [math.nan, math.inf, torch.tensor(math.nan), torch.ones(2), np.float32(math.inf)])
def test_factors_that_are_no_finite_number(factor):
    for combine in (lambda: V_ALONE * factor, lambda: factor * V_ALONE, lambda: V_ALONE / factor):
        with pytest.raises(LaaiError, match=r"^scale is .*: expected a finite number$"):
            combine()


def test_a_truth_value_switches():
    for on in (True, np.True_, torch.tensor(True)):
        assert (V_ALONE * on).sha256 == (on * V_ALONE).sha256 == (V_ALONE * 1).sha256
    assert (V_ALONE * False).sha256 == (V_ALONE * 0).sha256


@pytest.mark.parametrize("zero", [0, 0.0, np.float32(0), torch.tensor(0)])
def test_division_by_zero(zero):
    with pytest.raises(LaaiError, match="^an intervention cannot be divided by 0$"):
        V_ALONE / zero


# --- negative layers


def test_negative_layers_are_resolved_when_saved(tmp_path):
    last = Intervention({-1: torch.ones(1, 2), 0: torch.zeros(1, 2)}, metadata={"num_hidden_layers": 4})
    last.save(tmp_path / "x.safetensors")
    loaded = Intervention.load(tmp_path / "x.safetensors")
    assert loaded.layers == [0, 3]
    assert loaded.vector(3).tolist() == [[1, 1]]
    assert last.sha256 == loaded.sha256


@pytest.mark.parametrize(
    ("layers", "metadata", "words"),
    [
        ([-1], {}, "num_hidden_layers"),
        ([-5], {"num_hidden_layers": 4}, "0 to 3"),
        ([4], {"num_hidden_layers": 4}, "0 to 3"),
        ([-1, 3], {"num_hidden_layers": 4}, "twice"),
    ],
)
def test_layers_that_cannot_be_saved(layers, metadata, words, tmp_path):
    iv = Intervention({i: V for i in layers}, metadata=metadata)
    with pytest.raises(LaaiError, match=words):
        iv.save(tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


# --- metadata and repr


def test_metadata_of_a_sum_is_what_both_say_of_the_model():
    model = {"base_model": "m", "model_type": "llama", "num_hidden_layers": 4, "head_dim": 2}
    a = Intervention({0: V}, metadata={**model, "hidden_size": 8, "task": "antonym", "training": {"seed": 0}})
    b = Intervention({0: V}, metadata={**model, "base_model": "n", "task": "antonym", "training": {"seed": 0}})
    # The task and training of a sum are neither's, even where both agree.
    assert (a + b).metadata == {"model_type": "llama", "num_hidden_layers": 4, "head_dim": 2}
    assert (a + Intervention({0: V})).metadata == {}
    assert (2 * a).metadata == a.metadata


def test_repr_is_short_and_complete():
    iv = Intervention({3: torch.ones(2, 4), 1: torch.ones(2, 4)}, position="all", scale=0.5)
    assert repr(iv) == (
        "Intervention({1: (2, 4), 3: (2, 4)}, site='heads', position='all', scale=0.5, operation='add')"
    )
