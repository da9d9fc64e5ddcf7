"""Facts that a small random model knows: whatever it says next is their true target."""

from __future__ import annotations

from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.models.editable_model import EditableModel
from nse_tools.tracing.prompts import locate

SUBJECTS = ("Danielle Darrieux", "São Paulo", "the Eiffel Tower", "Berlin", "the piano", "the mother tongue", "Japan", "Rome and Paris")
PROMPTS = (
    *("The city of {} is", "I think {} plays", "You are right, {}", "Therefore {} is in the", "The capital, {}, and", "Because {} is"),
    *("In {} the", "That {} was", "Paris, {} and", "The tongue of {}", "It is {} that", "I play {} in", "Where {} plays"),
)


def known_to(model: EditableModel, count: int = 4) -> FactList:
    """Return facts whose true target is the model's own next token."""
    found: list[Fact] = []
    for prompt in PROMPTS:
        for subject in SUBJECTS:
            token = model.next_tokens(prompt.replace("{}", subject), k=1).token[0]
            answer = token.strip()
            if token != f" {answer}" or not answer.isalpha() or len(locate(model, prompt, subject, target=answer).target_ids) != 1:
                continue
            found.append(Fact(f"known {len(found)}", subject, prompt, "Rome" if answer != "Rome" else "Japan", answer))
            if len(found) == count:
                return FactList(found)
    raise AssertionError(f"only {len(found)} facts are known to {model.name}")
