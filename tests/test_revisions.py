"""The judge's flags by revision."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from keel.eval.revisions import Chain, flags_by_revision
from keel.types import Completion, Grade, Message, Prompt


class Reads:
    """Finds what a reply says. Of "far" prompts it cannot tell whether they are rude; "gone" has no grade."""

    def grade(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Grade | None]:
        return [
            None
            if reply.text == "gone"
            else Grade(
                0.0, {"rude": None if prompt.kind == "far" else "rude" in reply.text, "long": len(reply.text) > 9}
            )
            for prompt, reply in zip(prompts, completions, strict=True)
        ]


def chain(id: str, *replies: str, kind: str = "") -> Chain:
    return Chain(Prompt(id, (Message("user", id),), kind), replies)


def test_shares_are_counted_over_the_same_prompts_at_every_revision() -> None:
    chains = [
        chain("a", "rude", "rude again", "kind"),
        chain("b", "rude", "kind", "kind"),
        chain("c", "kind", "kind", "kind"),
        chain("d", "rude", "rude", "kind"),
        chain("far", "rude", "rude", "rude", kind="far"),  # does not apply there
        chain("e", "rude", "gone", "rude"),  # no grade in the middle
        chain("short", "rude", "rude"),  # left out: it ended early
    ]
    found = flags_by_revision(chains, Reads())
    assert [share and share[0] for share in found["rude"]] == [0.75, 0.5, 0.0]
    assert [share and share[0] for share in found["long"]] == [0.0, pytest.approx(1 / 5), 0.0]
    # Wilson's interval of 3 in 4 and of 0 in 4, worked out by hand with z = 1.959964
    assert found["rude"][0] == pytest.approx((0.75, 0.3006, 0.9544), abs=1e-4)
    assert found["rude"][2] == pytest.approx((0.0, 0.0, 0.4899), abs=1e-4)


def test_chains_of_one_prompt_are_no_independent_prompts() -> None:
    apart = flags_by_revision([chain(str(i), "rude" if i % 2 else "kind") for i in range(40)], Reads())["rude"][0]
    together = flags_by_revision([chain(str(i % 4), "rude" if i % 2 else "kind") for i in range(40)], Reads())["rude"][
        0
    ]
    assert apart is not None
    assert together is not None
    assert together[2] - together[1] > 1.5 * (apart[2] - apart[1])


def test_nothing_to_count() -> None:
    assert flags_by_revision([], Reads()) == {}
    assert flags_by_revision([chain("far", "rude", "kind", kind="far")], Reads())["rude"] == [None, None]
