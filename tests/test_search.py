"""Search at test time. The oracles: languages written down as tables, whose best replies are known; counts by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
from tabular import END, Tabular
from test_chat import FAMILIES as BYTE_LEVEL
from test_chat_tokens import FAMILIES as SENTENCEPIECE
from tiny import Counting, tiny_llama, tiny_tokenizer

from keel.data.chat import Chat
from keel.recipe.search import SearchConfig
from keel.recipe.sections import SamplingConfig
from keel.recipe.steps import Steps
from keel.reward.process import aggregated
from keel.rollout.collect import Choice, sample_replies, stop_token_ids
from keel.rollout.sampler import make_sampler
from keel.rollout.tokens import further, stream_key
from keel.search.growing import Grower, ended, step_ends
from keel.search.paths import Costs, Found, Path
from keel.search.picking import Ballot, pick
from keel.search.ranking import ReplyRanker, StepRanker
from keel.search.run import Tools, make_grower, pool, search
from keel.search.sampled import Pool
from keel.stages.search import make_ballot
from keel.types import Completion, Message, Prompt, Scores, UserError

CHAT = Chat(tiny_tokenizer())
LINES = step_ends(CHAT.tokenizer, Steps())
SCORER = {"kind": "python_steps", "ref": "x:y"}
Table = Callable[[str, str], Sequence[tuple[str, float]]]


def asked(*questions: str) -> list[Prompt]:
    return [Prompt(question, (Message("user", question),)) for question in questions]


class Values:
    """A scorer of steps from a function of the text up to each step's end."""

    def __init__(self, value: Callable[[str], float]) -> None:
        self.value = value

    def score_steps(self, prompts: Sequence[Prompt], replies: Sequence[tuple[str, ...]]) -> list[tuple[float, ...]]:
        return [tuple(self.value("".join(steps[: i + 1])) for i in range(len(steps))) for steps in replies]


def by_last(value: Callable[[str], float]) -> StepRanker:
    return StepRanker(Values(value), "last")


def config(how: str, **settings: Any) -> SearchConfig:
    scored = how not in ("majority", "revise")
    return SearchConfig.model_validate({"how": how, **({"scorer": SCORER} if scored else {}), **settings})


def tools(config: SearchConfig, table: Table, **more: Any) -> tuple[Tools, Tabular]:
    stops = frozenset({END})
    sampler = Tabular(table, stops | LINES if config.in_steps else stops)
    return Tools(CHAT, sampler, stops, None, Steps(), **more), sampler


def find(
    config: SearchConfig,
    table: Table,
    prompts: Sequence[Prompt] = (),
    seed: int = 0,
    limit: int = 60,
    **more: Any,
) -> list[Found]:
    made, _ = tools(config, table, **more)
    return search(config, made, prompts or asked("q"), SamplingConfig(max_new_tokens=limit), seed, Counting())


def answers(found: Sequence[Found]) -> list[str | None]:
    return [None if one.answer is None else one.answer.text for one in found]


# ------------------------------------------------------------------------------------------------------------- trees

LETTERS = "abc"
LEAVES = {"".join(word): i * 10 % 27 / 27 for i, word in enumerate(product(LETTERS, repeat=3))}  # no two alike


def tree(question: str, reply: str) -> list[tuple[str, float]]:
    """Three lines of one of three letters each."""
    written = "".join(reply.split())
    if len(written) == 3:
        return [("!", 1.0)]
    return [(f"{letter}\n", 1 / 3) for letter in LETTERS]


def best_below(text: str) -> float:
    """The best value that the text can still come to: what an oracle says of its last step."""
    written = "".join(text.split())
    return max(value for word, value in LEAVES.items() if word.startswith(written))


@pytest.mark.parametrize(
    "settings",
    [{"how": "beam", "width": 1, "expand": 20}, {"how": "beam", "width": 3, "expand": 9}, {"how": "dvts", "n": 40,
     "width": 20}],
    ids=str,
)  # fmt: skip
def test_with_an_oracle_the_optimum_is_found(settings: dict[str, Any]) -> None:
    optimum = max(LEAVES, key=lambda word: LEAVES[word])
    for found in find(config(**settings), tree, asked("q", "r", "s"), ranker=by_last(best_below)):
        assert found.answer is not None
        assert "".join(found.answer.text.split()) == optimum
        assert found.answer.reward == LEAVES[optimum]


def test_looking_ahead_changes_the_choice() -> None:
    """The first line that looks better leads nowhere. A beam takes it; whoever looks a step ahead does not."""

    def table(question: str, reply: str) -> list[tuple[str, float]]:
        return [("a\n", 0.5), ("b\n", 0.5)] if not reply else [("c\n", 0.9), ("d\n", 0.1)] if len(reply) < 4 else [
            ("!", 1.0)
        ]  # fmt: skip

    values = {"a": 0.9, "b": 0.5, "ac": 0.2, "bc": 0.8, "ad": 0.3, "bd": 0.0}
    ranker = by_last(lambda text: values["".join(text.split())])
    blind, ahead = config("beam", width=1, expand=8), config("lookahead", width=1, expand=8, depth=1)
    assert [(one.answer.text, one.answer.reward) for one in find(blind, table, ranker=ranker) if one.answer] == [
        ("a\nd\n", 0.3)
    ]
    assert [(one.answer.text, one.answer.reward) for one in find(ahead, table, ranker=ranker) if one.answer] == [
        ("b\nc\n", 0.8)
    ]


def test_finished_beams_hold_their_places_and_vote_once() -> None:
    """One reply is done after a line, three go on for three. Copies of the first would outvote the others."""

    def table(question: str, reply: str) -> list[tuple[str, float]]:
        if not reply:
            return [("1!", 0.25), ("2\n", 0.25), ("3\n", 0.25), ("4\n", 0.25)]
        return [("7!", 1.0)] if len(reply) == 6 else [("5\n", 1.0)]

    ballot = Ballot(lambda text: text.split()[-1])
    made = config("beam", width=4, expand=8, pick="majority")
    [found] = find(made, table, ranker=by_last(lambda text: 0.5), ballot=ballot)
    assert sorted(path.text for path in found.paths) == ["1", "2\n5\n5\n7", "3\n5\n5\n7", "4\n5\n5\n7"]
    assert found.answer is not None
    assert found.answer.text.endswith("7")
    assert found.answer.reward == 3 / 4
    # Where a done reply is better than all others it keeps one of two places.
    narrow = config("beam", width=2, expand=8)
    [found] = find(narrow, table, ranker=by_last(lambda text: 1.0 if text == "1" else 0.5))
    assert found.paths[0].text == "1"
    assert len(found.paths) == 2
    assert answers([found]) == ["1"]


def test_trees_are_apart() -> None:
    """Each of three trees ends in the better of what it draws, whatever the others hold: one answer a tree."""

    def table(question: str, reply: str) -> list[tuple[str, float]]:
        return [("!", 1.0)] if len(reply) > 3 else [(f"{letter}\n", 1 / 3) for letter in LETTERS]

    made = config("dvts", n=6, width=2)
    [found] = find(made, table, ranker=by_last(lambda text: text.count("b") / 4), seed=2)
    alone = [find(made.model_copy(update={"n": 2}), table, ranker=by_last(lambda text: text.count("b") / 4), seed=2)]
    assert len(found.paths) == 3
    assert found.paths[0] == alone[0][0].paths[0], "the first tree, had there been no other"


def test_what_is_unfinished_never_answers() -> None:
    def endless(question: str, reply: str) -> list[tuple[str, float]]:
        return [("a\n", 1.0)]

    ballot = Ballot(lambda text: text)
    for made in (config("beam", width=2, expand=2), config("dvts", n=4, width=2), config("best_of_n", n=3),
                 config("majority", n=3), config("beam", width=2, expand=2, max_steps=3)):  # fmt: skip
        [found] = find(made, endless, limit=9, ranker=by_last(lambda text: 1.0), ballot=ballot)
        assert found.answer is None
        assert found.paths == ()
        assert found.unfinished > 0
        assert found.generated > 0

    def some(question: str, reply: str) -> list[tuple[str, float]]:
        return [("b!", 0.5), ("a a a a a a a a\n", 0.5)] if not reply else [("a\n", 1.0)]

    [found] = find(config("best_of_n", n=8), some, limit=9, ranker=by_last(lambda text: text.count("a") / 99))
    assert answers([found]) == ["b"], "a cut reply would score higher, were it scored"
    assert 0 < found.unfinished < 8


def test_costs_are_counted() -> None:
    """Two tokens a line, and each reply is a line that goes on and one that ends: "a", newline, "b", end."""

    def table(question: str, reply: str) -> list[tuple[str, float]]:
        return [("b!", 1.0)] if reply else [("a\n", 1.0)]

    ranker, ballot = by_last(lambda text: 0.5), Ballot(lambda text: text)

    def cost(made: SearchConfig) -> tuple[int, int]:
        [found] = find(made, table, ranker=None if made.how == "majority" else ranker, ballot=ballot)
        return found.generated, found.scored

    assert cost(config("majority", n=3)) == (12, 0)
    assert cost(config("best_of_n", n=3)) == (12, 12)
    assert cost(config("weighted", n=3)) == (12, 12)
    # 4 ways of 2 tokens, which are all the same: one is scored. 2 ways on from there, one of 4 tokens scored.
    assert cost(config("beam", width=2, expand=2)) == (8 + 4, 2 + 4)
    # Each of the two trees: 2 ways, then 2.
    assert cost(config("dvts", n=4, width=2)) == (2 * (4 + 4), 2 * (2 + 4))
    # The one way that is left is rolled out by a step of 2 tokens, and scored with it.
    assert cost(config("lookahead", width=2, expand=2, depth=1)) == (8 + 2 + 4, 4 + 4)


def test_what_a_prompt_costs_is_its_own() -> None:
    """Beside a reply with more room left, one is drawn beyond its own limit: nothing of that is its."""

    def table(question: str, reply: str) -> list[tuple[str, float]]:
        begun = {"q": "a a a a\n", "r": "b\n"}[question]
        return [(begun if not reply else "c c c c c c c c c c c c\n", 1.0)]

    made, ranker = config("beam", width=1, expand=1), by_last(lambda text: 0.5)
    both = find(made, table, asked("q", "r"), limit=10, ranker=ranker)
    assert [one.generated for one in both] == [10, 10], "one way each, to the limit"
    assert find(made, table, asked("q"), limit=10, ranker=ranker) == both[:1]


def test_a_step_that_no_token_ends_is_cut_out_and_what_follows_is_paid_for() -> None:
    how = Steps(by="marker", marker=";;")
    assert step_ends(CHAT.tokenizer, how) == frozenset()

    def table(question: str, reply: str) -> list[tuple[str, float]]:
        return [("b!", 1.0)] if ";;" in reply else [("a;;", 1.0)]

    made = config("beam", width=1, expand=1, steps={"by": "marker", "marker": ";;"})
    made_tools = Tools(CHAT, Tabular(table), frozenset({END}), None, how, by_last(lambda text: 0.5))
    [found] = search(made, made_tools, asked("q"), SamplingConfig(max_new_tokens=60), 0, Counting())
    assert answers([found]) == ["a;;b"]
    assert [path.steps for path in found.paths] == [("a;;", "b")]
    assert found.generated == 5 + 2, "the whole reply, of which three tokens stay, and its end once more"
    assert found.scored == 3 + 5


# ------------------------------------------------------------------------------------------------- plain sampling


def model_tools(config: SearchConfig, sampling: SamplingConfig, ranker: Any = None) -> Tools:
    model = tiny_llama(3)
    return Tools.of(config, model, CHAT, sampling, Steps(), ranker, Ballot(str), "fp32")


def test_of_one_sample_it_is_plain_sampling_bit_for_bit() -> None:
    prompts = asked("what is a ship", "yes", "no one", "the salt")
    sampling = SamplingConfig(max_new_tokens=12, temperature=0.7)
    stops = stop_token_ids(CHAT, sampling)
    sampler = make_sampler(tiny_llama(3), "auto", stops)
    ids = CHAT.encode_prompts([p.messages for p in prompts])
    plain = sampler.generate(ids, sampling, 5)
    made = config("best_of_n", n=1)
    grower = make_grower(model_tools(made, sampling), prompts)
    paths = grower.whole([Path(i, sample) for i, sample in enumerate(streams(5, 4))], sampling)
    assert [(path.ids, path.logprobs, path.state == "finished") for path in paths] == [
        (one.ids, one.logprobs, one.finished) for one in plain
    ]
    drawn = pool(made, model_tools(made, sampling), prompts, sampling, 5, Counting())
    assert [(group[0].ids, group[0].logprobs) for group in drawn] == [(one.ids, one.logprobs) for one in plain]
    # A beam of one way is the same reply, drawn in pieces: line by line, its random numbers going on.
    from_beam = config("beam", width=1, expand=1)
    found = search(
        from_beam, model_tools(from_beam, sampling, by_last(lambda text: 0.5)), prompts, sampling, 5, Counting()
    )
    done = [one.ids if one.finished else None for one in plain]
    assert [one.answer.ids if one.answer is not None else None for one in found] == done
    assert [one.generated for one in found] == [len(one.ids) for one in plain]
    kept = sample_replies(sampler, CHAT, prompts, sampling, Choice(), 5, Counting())
    assert len(kept) == 4


def streams(seed: int, count: int) -> list[int]:
    return [stream_key(seed, i) for i in range(count)]


@pytest.mark.parametrize("backend", ["embedded", "transformers"])
def test_a_stream_is_a_prompts_own_and_goes_on_where_it_was_left(backend: Any) -> None:
    model, sampling = tiny_llama(3), SamplingConfig(max_new_tokens=8)
    sampler = make_sampler(model, backend, (END,))
    prompts = [[7, 8, 9], [10, 11], [12]]
    whole = sampler.generate(prompts, sampling, 5)
    assert [c.ids for c in sampler.generate(prompts, sampling, 9, streams(5, 3))] == [c.ids for c in whole]
    assert sampler.generate(prompts[1:2], sampling, 9, streams(5, 2)[1:])[0].ids == whole[1].ids, (
        "whatever is beside it"
    )
    later = [[*prompt, *c.ids[:3]] for prompt, c in zip(prompts, whole, strict=True)]
    rest = sampler.generate(later, sampling.model_copy(update={"max_new_tokens": 5}), 9, [
        further(key, 3) for key in streams(5, 3)
    ])  # fmt: skip
    assert [c.ids[:3] + more.ids for c, more in zip(whole, rest, strict=True)] == [c.ids for c in whole]


@pytest.mark.parametrize("settings", [{"how": "best_of_n", "n": 5}, {"how": "beam", "width": 2, "expand": 2},
                                      {"how": "dvts", "n": 4, "width": 2}], ids=str)  # fmt: skip
def test_no_prompt_changes_what_is_found_for_another(settings: dict[str, Any]) -> None:
    """And the same seed finds the same, whatever is decoded together."""
    made = config(**settings)
    sampling = SamplingConfig(max_new_tokens=10)
    ranker = by_last(lambda text: len(text) % 7 / 7)
    prompts = asked("a", "b", "c")
    whole = search(made, model_tools(made, sampling, ranker), prompts, sampling, 1, Counting())
    small = SamplingConfig(max_new_tokens=10, batch_size=1)
    assert [ids(one) for one in search(made, model_tools(made, small, ranker), prompts, small, 1, Counting())] == [
        ids(one) for one in whole
    ]
    first = search(made, model_tools(made, sampling, ranker), prompts[:1], sampling, 1, Counting())
    assert ids(first[0]) == ids(whole[0])
    other = search(made, model_tools(made, sampling, ranker), prompts, sampling, 2, Counting())
    assert [one.generated for one in other] != [one.generated for one in whole] or other != whole


def ids(found: Found) -> Any:
    return [path.ids for path in found.paths], found.unfinished, found.generated, found.scored


def test_a_pool_is_what_fewer_samples_would_have_been() -> None:
    made = config("best_of_n", n=4)
    ranker = by_last(lambda text: len(text) % 5 / 5)
    table_tools, _ = tools(made, tree, ranker=ranker)
    prompts, sampling = asked("q", "r"), SamplingConfig(max_new_tokens=60)
    large, _ = tools(config("majority", n=9), tree)
    groups = pool(config("majority", n=9), large, prompts, sampling, 3, Counting())
    assert Pool.of(groups, prompts, ranker).found(made, None, 0, 4) == search(
        made, table_tools, prompts, sampling, 3, Counting()
    )


# --------------------------------------------------------------------------------------------------- picks and scores


def path(text: str, score: float | None = None) -> Path:
    return Path(0, 0, (1,), (0.0,), "finished", text, (text,), score=score)


def test_votes_and_ties() -> None:
    ballot = Ballot(lambda text: text.split("=")[-1] if "=" in text else None, lambda a, b: float(a) == float(b))
    some = [path("x=1", 0.2), path("none", 0.9), path("y=2", 0.3), path("x=1.0", 0.2), path("z=2", 0.2)]
    majority = pick(some, "majority", None, ballot)
    assert majority is not None
    assert (majority.text, majority.reward) == ("x=1", 0.5), "two of four votes, the first drawn; none is no vote"
    weighted = pick(some, "weighted", by_last(lambda text: 0.0), ballot)
    assert weighted is not None
    assert (weighted.text, weighted.reward) == ("y=2", 0.3), "0.5 against 0.4; the best of them speaks"
    best = pick(some, "best", None, None)
    assert best is not None
    assert best.text == "none"
    assert pick([path("a", 0.5), path("b", 0.5)], "best", None, None) == path("a").reply(0.5)
    assert pick([path("none", 1.0)], "majority", None, ballot) is None
    assert pick([], "best", None, None) is None


def test_votes_read_behind_the_thinking() -> None:
    ballot = make_ballot(config("majority", n=2, thinking={}))
    assert ballot is not None
    assert ballot.answer_of("<think>it is 5</think>#### 6") == "6"
    assert ballot.answer_of("<think>it is 5</think>nobody could ever really know that") is None
    assert ballot.answer_of("<think>it is 5") is None
    plain = make_ballot(config("majority", n=2))
    assert plain is not None
    assert plain.answer_of("<think>it is 5") == "5"


@pytest.mark.parametrize("unread", [{"read": "boxed"}, {"thinking": {}}], ids=str)
def test_how_votes_read_is_no_setting_without_votes(unread: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="has no votes; leave it out"):
        config("beam", width=2, expand=2, **unread)
    assert config("beam", width=2, expand=2, pick="majority", **unread).votes


def test_a_reward_models_votes_weigh_by_its_logistic_function() -> None:
    class Length:
        def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
            import torch

            return Scores(torch.tensor([float(len(c.text)) - 3 for c in completions]))

    ranker = ReplyRanker(Length())
    scored = ranker.score(asked("q"), [path("a"), path("aaa"), path("aaaaa")], Costs.of(1))
    assert [one.score for one in scored] == [-2.0, 0.0, 2.0]
    assert [round(ranker.weight(one), 4) for one in scored] == [0.1192, 0.5, 0.8808]


def test_aggregates() -> None:
    scores = (0.5, 0.9, 0.8)
    assert [aggregated(scores, how) for how in ("min", "last")] == [0.5, 0.8]  # type: ignore[arg-type]
    assert aggregated(scores, "product") == pytest.approx(0.36)
    assert aggregated(scores, "mean") == pytest.approx(2.2 / 3)
    assert aggregated((), "product") == 0.0


@pytest.mark.parametrize(("scores", "wrong"), [((0.5,), "1 scores for 2 steps"), ((0.5, 1.5), "between 0 and 1"),
                                               ((0.5, float("nan")), "between 0 and 1")])  # fmt: skip
def test_a_wrong_scorer_is_named(scores: tuple[float, ...], wrong: str) -> None:
    class Wrong:
        def score_steps(self, prompts: Any, replies: Any) -> list[tuple[float, ...]]:
            return [scores for _ in replies]

    reply = Path(0, 0, (1,), (0.0,), "finished", "a\nb", ("a\n", "b"))
    with pytest.raises(UserError, match=f"'q'.*{wrong}"):
        StepRanker(Wrong(), "min").score(asked("q"), [reply], Costs.of(1))
    nothing = StepRanker(Wrong(), "min").score(asked("q"), [path(" ")], Costs.of(1))
    assert nothing[0].score == 0.0, "a reply of nothing is not asked about"


# ------------------------------------------------------------------------------------------------ growing by steps

CHATS = {
    **BYTE_LEVEL,
    **{f"{name}, sentencepiece": make for name, make in SENTENCEPIECE.items()},
    "tiny": tiny_tokenizer,
}
TEXTS = ("hello 2+2=4.\nhello you 4*5=20\n\nthe answer is 20", "  hello\n\n\n   indented\n\tfour\n", "héllo 🙂\n🙂\nки")


class Written:
    """A sampler that writes given tokens behind the prompt, and stops where it is told to."""

    def __init__(self, begun: int, ids: Sequence[int], stops: frozenset[int]) -> None:
        self.begun, self.ids, self.stops = begun, ids, stops

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        seed: int,
        streams: Sequence[int] | None = None,
    ) -> list[Completion]:
        [prompt] = prompts
        rest = self.ids[len(prompt) - self.begun :]
        end = next((i + 1 for i, token in enumerate(rest) if token in self.stops), len(rest))
        return [Completion("", tuple(rest[:end]), (0.0,) * end, rest[end - 1] in self.stops)]


@pytest.mark.parametrize("how", [Steps(), Steps(by="blank_line"), Steps(by="marker", marker="ки")], ids=str)
@pytest.mark.parametrize("name", CHATS)
def test_a_reply_grows_by_its_steps_whatever_its_tokens(name: str, how: Steps) -> None:
    """The pieces are the tokens that were written, each step ends as soon as the splitter says so, and nothing is drawn
    twice where a token tells that a step ends."""
    chat = Chat(CHATS[name]())
    stops, prompt = frozenset(chat.stop_ids), chat.encode_prompt([Message("user", "how many?")])
    ends = step_ends(chat.tokenizer, how) - stops
    for text in TEXTS:
        written = [*chat.tokenizer.encode(text, add_special_tokens=False), chat.end_ids[-1]]
        sampler = Written(len(prompt), written, stops | ends)
        grower = Grower(chat, sampler, stops, how, {0: prompt}, None, Costs.of(1))
        path, sampling = Path(0, 0), SamplingConfig(max_new_tokens=200)
        while path.state == "open":
            before = path
            [path] = grower.step([path], sampling)
            assert path.ids == tuple(written[: len(path.ids)])
            if path.state == "open":
                assert len(path.steps) == len(before.steps) + 1
                shorter = chat.decode(path.ids[:-1], so_far=True)
                assert len(ended(how, shorter)) == len(before.steps), "no token later than need be"
        assert path.state == "finished"
        assert path.ids == tuple(written)
        said = chat.decode(written)
        assert path.text == said
        assert path.steps == how.split(said)
        if how.by != "marker":
            assert grower.costs.generated[0] == len(written)


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"how": "best_of_n", "scorer": SCORER}, "best_of_n needs n"),
        ({"how": "best_of_n", "n": 4}, "best_of_n needs scorer"),
        ({"how": "majority", "n": 4, "scorer": SCORER}, "majority takes no scorer"),
        ({"how": "majority", "n": 4, "width": 2}, "majority takes no width"),
        ({"how": "beam", "width": 2, "expand": 2, "n": 4, "scorer": SCORER}, "beam takes no n"),
        ({"how": "beam", "width": 2, "scorer": SCORER}, "beam needs expand"),
        ({"how": "beam", "width": 2, "expand": 2, "depth": 1, "scorer": SCORER}, "beam takes no depth"),
        ({"how": "lookahead", "width": 2, "expand": 2, "scorer": SCORER}, "lookahead needs depth"),
        ({"how": "dvts", "n": 6, "width": 4, "scorer": SCORER}, "leaves a rest"),
        ({"how": "dvts", "n": 6, "width": 1, "scorer": SCORER}, "nothing to choose"),
        ({"how": "dvts", "n": 4, "width": 4, "pick": "majority", "scorer": SCORER}, "is a vote"),
        ({"how": "beam", "width": 1, "expand": 4, "pick": "weighted", "scorer": SCORER}, "is a vote"),
        ({"how": "beam", "width": 2, "expand": 2, "scorer": {"kind": "model", "model": "rm"}}, "scores whole replies"),
        ({"how": "best_of_n", "n": 2, "aggregate": "min", "scorer": {"kind": "model", "model": "rm"}}, "aggregate"),
        ({"how": "revise", "aggregate": "min"}, "there is none"),
        ({"how": "revise", "n": 2}, "revise takes no n"),
        ({"how": "majority", "n": 2, "sampling": {"temperature": 0}}, "all 2 samples of majority are the same"),
        ({"how": "beam", "width": 2, "expand": 2, "scorer": SCORER, "sampling": {"stop": ["\n"]}}, "where a step ends"),
        ({"how": "guess"}, "how"),
        ({"how": "majority", "n": 2, "seeds": 3}, "seeds"),
        ({"how": "best_of_n", "n": 2, "scorer": {"kind": "endpoint", "url": "u", "model": "m"}}, "scorer"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        SearchConfig.model_validate(settings)


def test_settings_come_back_from_a_file() -> None:
    made = config("dvts", n=8, width=4, pick="weighted", steps={"by": "blank_line"})
    assert SearchConfig.model_validate(made.model_dump(mode="json")) == made
    assert (made.paths, made.trees) == (8, (2, 1, 4))
    beams = config("beam", width=3, expand=2)
    assert (beams.paths, beams.trees) == (6, (1, 3, 2))
    assert config("revise").paths == 1
