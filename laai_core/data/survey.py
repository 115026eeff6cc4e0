"""The bundled survey: invented questions and invented answers, so that opinion tasks run without any data.

Nobody was asked anything. Four groups of respondents differ in one tendency each, the same on every question: the keen
choose the end of the scale that is most for its subject, the wary the other end, the moderate its middle, the divided
both ends. Half the questions list their options the other way round, so a letter alone says nothing about a group.
"""

from __future__ import annotations

import hashlib
import math
import random

from laai_core.data.aggregated import counts_of_records
from laai_core.data.opinion import Opinion, shares

# Question templates, and their scales from most to least for the subject.
QUESTIONS = [
    ("How often do you visit the {}?", ("Always", "Often", "Sometimes", "Rarely", "Never")),
    ("How important is the {} to you?", ("Essential", "Important", "Useful", "Minor", "Worthless")),
    ("How good is the {}?", ("Excellent", "Good", "Fair", "Poor")),
    ("How much do you trust the {}?", ("Fully", "Mostly", "Partly", "Hardly")),
    ("Should the {} get more money?", ("More", "Same", "Less")),
    ("Would you vote for the {}?", ("Yes", "Unsure", "No")),
]
SUBJECTS = """
bakery bank bridge choir cinema clinic council ferry fire garden harbour library market mayor museum orchestra park
police pool railway school stadium theatre university
""".split()
REFUSED = "Refused"
RESPONDENTS = 1000  # per group
STEEPNESS = 4.0  # how much a group prefers its own part of the scale, in logits over the whole scale
JITTER = 0.3  # how far a group's answers to single questions stray from its tendency, in logits

# Group -> preference for a position on the scale, from 0 (most for the subject) to 1 (most against it).
TENDENCIES = {
    "keen": lambda position: -position,
    "wary": lambda position: position - 1,
    "moderate": lambda position: -2 * abs(position - 0.5),
    "divided": lambda position: 2 * abs(position - 0.5) - 1,
}


def survey_opinions(group: str) -> list[Opinion]:
    """The opinions of a group, question by question."""
    counted = counts_of_records(survey_records(), group, "the bundled survey")
    return shares(counted, group, "the bundled survey")


def survey_records() -> dict[str, dict]:
    """The survey in aggregated form: {question key: {"MC_options", "question_text", group: {option: count}}}.

    144 questions with three to five options and a refusal. Deterministic.
    """
    records: dict[str, dict] = {}
    for number, (question, scale) in enumerate(QUESTIONS, start=1):
        for subject in SUBJECTS:
            key = f"{subject}_{number}"
            reversed_ = hashlib.sha256(f"order of {key}".encode()).digest()[0] % 2 == 1
            records[key] = {
                "MC_options": [*(scale[::-1] if reversed_ else scale), REFUSED],
                "question_text": question.format(subject),
                **{group: answer_counts(key, group, scale) for group in TENDENCIES},
            }
    return records


def answer_counts(key: str, group: str, scale: tuple[str, ...]) -> dict[str, float]:
    """Numbers of RESPONDENTS that chose each option of `scale`, and that refused."""
    noise = random.Random(f"{group} on {key}")  # seeded with a text: the same numbers on every machine
    positions = [index / (len(scale) - 1) for index in range(len(scale))]
    shares = [math.exp(STEEPNESS * TENDENCIES[group](position) + JITTER * noise.gauss(0, 1)) for position in positions]
    refused = noise.randrange(40)
    counts = [round((RESPONDENTS - refused) * share / sum(shares)) for share in shares]
    return dict(zip([*scale, REFUSED], map(float, [*counts, refused]), strict=True))
