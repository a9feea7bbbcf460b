"""What is concluded from attacks, and where nothing is: a folder with hand-made answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attacking import COURSES, FORGET, HALF, N, lay_out

from retrograd.attack.course import read_course
from retrograd.attack.findings import findings, unseen
from retrograd.attack.folder import read_folder
from retrograd.attack.tell import write_findings
from retrograd.settings.attack import Configuration, Finetune, Untrained, name_of
from retrograd.settings.prompted import Prompted
from retrograd.settings.tasks import tasks_from


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_out(tmp_path_factory.mktemp("attacks") / "out", [HALF, FORGET])


@pytest.fixture(scope="module")
def found(out: Path) -> dict[str, Any]:
    return findings(read_folder(out), (0.05, 0.5))


def meeting(found: dict[str, Any], name: str, one: Configuration = HALF) -> dict[str, Any]:
    return next(
        m for m in found["meetings"] if m["model"].split("-")[-2] == name and m["configuration"] == name_of(one)
    )


def test_recovery_is_told_with_its_budget(found: dict[str, Any]) -> None:
    shallow = meeting(found, "shallow")
    assert shallow["inapplicable"] is None
    assert shallow["gap"] == pytest.approx((76 - 20) / 80)
    half = shallow["reached"]["0.5"]
    assert (half["step"], half["after"], half["tokens"], half["flops"]) == (1, 0, 100, 600)
    assert half["retain"] == pytest.approx(39 / N)
    late = shallow["reached"]["0.9"]
    assert (late["step"], late["after"], late["unconfirmed"]) == (2, 1, False)  # the attack's last needs no other
    assert shallow["most"]["value"] == pytest.approx((74 - 20) / 56)
    assert [point["recovered"] for point in shallow["points"]] == pytest.approx([0, 40 / 56, 54 / 56])


def test_latent_recovery_tells_what_was_shown_from_what_was_there(found: dict[str, Any]) -> None:
    deep, shallow = meeting(found, "deep"), meeting(found, "shallow")
    assert deep["points"][-1]["forget"] > 0.6  # it learnt what it was shown
    assert deep["latent"]["last"]["value"] == 0
    assert shallow["latent"]["last"]["value"] == pytest.approx((36 - 10) / N - (9 - 10) / N)
    assert shallow["latent"]["last"]["interval"][0] > 0
    assert shallow["latent"]["questions"] == N
    assert "latent" not in meeting(found, "shallow", FORGET)  # that attack shows everything
    assert meeting(found, "filtered")["latent"]["last"]["value"] == 0


def test_nothing_is_concluded_from_a_destroyed_start_or_one_that_never_forgot(found: dict[str, Any]) -> None:
    broken, whole = meeting(found, "broken"), meeting(found, "whole")
    assert broken["verdict"] == "destroyed"
    assert "destroyed" in broken["inapplicable"]
    assert "nothing to come back" in whole["inapplicable"]
    for one in (broken, whole):
        assert not {"reached", "area", "most"} & one.keys()
        assert "recovered" not in one["points"][0]


def test_a_failed_evaluation_stays_missing(found: dict[str, Any]) -> None:
    leaky = meeting(found, "leaky")
    point = leaky["points"][1]
    assert (point["forget"], point["forget_interval"], point["recovered"], point["latent"]) == (None, None, None, None)
    assert point["missing"] == "forget_a: the file is gone"
    assert leaky["reached"]["0.5"]["step"] == 2
    assert leaky["latent"]["best"]["step"] == 2


def test_an_attack_that_leaves_the_shallow_model_is_no_attack(out: Path, tmp_path: Path) -> None:
    resisted = {**COURSES, "shallow": [(10, 10), (11, 10), (12, 11)]}
    weak = findings(read_folder(lay_out(tmp_path / "out", [HALF], resisted)), (0.05,))
    assert weak["configurations"][name_of(HALF)]["valid"]["valid"] is False
    write_findings(weak, tmp_path / "out")
    text = (tmp_path / "out/attack.md").read_text()
    assert "no valid attack" in text
    assert "(invalid)" in text
    strong = findings(read_folder(out), (0.05,))
    assert strong["configurations"][name_of(HALF)]["valid"]["valid"] is True
    none = {name: course for name, course in COURSES.items() if name != "shallow"}
    unknown = findings(read_folder(lay_out(tmp_path / "other/out", [HALF], none)), (0.05,))
    assert unknown["configurations"][name_of(HALF)]["valid"] == {"valid": None, "why": "no shallow model met it"}


@pytest.mark.parametrize("one", [HALF, Prompted("suffix", steps=2)], ids=["trained", "searched"])
def test_a_short_attack_is_valid_by_its_last_evaluation_once_it_has_ended(one: Configuration, tmp_path: Path) -> None:
    late = {**COURSES, "shallow": [(10, 10), (11, 10), (36, 30)]}
    ended = findings(read_folder(lay_out(tmp_path / "out", [one], late)), (0.05,))
    assert meeting(ended, "shallow", one)["reached"]["0.5"]["step"] == 2
    assert ended["configurations"][name_of(one)]["valid"]["valid"] is True
    longer = dataclasses.replace(one, steps=3)  # type: ignore[arg-type]
    so_far = findings(read_folder(lay_out(tmp_path / "longer/out", [longer], late)), (0.05,))
    assert meeting(so_far, "shallow", longer)["reached"]["0.5"]["unconfirmed"]
    assert so_far["configurations"][name_of(longer)]["valid"]["valid"] is False


def test_controls_that_do_not_hold_are_named(found: dict[str, Any], tmp_path: Path) -> None:
    assert all(control["holds"] for control in found["controls"])
    bad = {**COURSES, "base": [(38, 38), (30, 28), (38, 38)], "random": [(10, 10), (10, 22), (10, 10)]}
    told = findings(read_folder(lay_out(tmp_path / "out", [HALF], bad)), (0.05,))["controls"]
    assert {control["role"]: control["steps"] for control in told} == {"base": [1], "random": [1]}
    taught = {**COURSES, "random": [(10, 10), (38, 10), (38, 10)]}  # what it is shown may be learnt
    told = findings(read_folder(lay_out(tmp_path / "b/out", [HALF, FORGET], taught)), (0.05,))["controls"]
    assert all(control["holds"] for control in told)
    assert [control["configuration"] for control in told if control["role"] == "random"] == [name_of(HALF)]


def test_the_worst_case_keeps_to_its_utility(found: dict[str, Any]) -> None:
    cases = {name.split("-")[-2]: one for name, one in found["worst"].items()}
    assert all(case["forget"] > 0.85 and case["step"] == 2 for case in cases["shallow"])
    assert [case["forget"] is None for case in cases["broken"]] == [True, True]
    assert all(case["questions"] == N for case in cases["shallow"])


def test_attacks_that_take_the_base_model_are_probes(tmp_path: Path) -> None:
    probe = Untrained("interpolate", (0.5, 1.0))
    found = findings(read_folder(lay_out(tmp_path / "out", [probe, HALF])), (0.05,))
    worst = [case for cases in found["worst"].values() for case in cases if case["forget"] is not None]
    assert {case["configuration"] for case in worst} == {name_of(HALF)}
    assert "latent" not in meeting(found, "deep", probe)
    assert "reached" not in meeting(found, "shallow", probe)
    assert meeting(found, "shallow", probe)["most"]["value"] > 0.9


def test_which_questions_an_attack_does_not_show() -> None:
    first = np.array([True, True, False])
    shown = {
        Finetune(data="half"): [False, False, True], Finetune(data="benign"): [True, True, True],
        Finetune(data="other_half"): [True, True, False], Finetune(data="half", before="other_half"): None,
        Finetune(data="half", before="benign"): [False, False, True], Finetune(data="forget"): None,
        Finetune(data="half", before="forget"): None, Finetune(data="mixed"): None, Untrained("prune"): [True] * 3,
        Untrained("few_shot"): [False, False, True], Prompted(): [False, False, True], Untrained("interpolate"): None,
    }  # fmt: skip
    for one, expected in shown.items():
        mask = unseen(one, first)
        assert (None if mask is None else mask.tolist()) == expected, one
    assert unseen(Finetune(data="half"), np.ones(3, bool)) is None


def test_real_sets_are_split_by_category(tmp_path: Path) -> None:
    """The half is named by subjects, of which both tasks have questions; each question is resampled by itself."""
    folder = read_folder(lay_out(tmp_path / "out", [HALF], half=("e0", "e1")))
    target = next(one for one in folder.targets if one.role == "shallow")
    course = read_course(folder, target, name_of(HALF), tasks_from(folder.tasks))
    assert course is not None
    assert course.first.tolist() == ([True] * 8 + [False] * (N - 8)) * 2
    assert len(set(course.clusters.tolist())) == 2 * N
    found = meeting(findings(folder, (0.05,)), "shallow")
    assert found["latent"]["questions"] == 2 * (N - 8)
    rise = ((30 - 2 + 28 - 2) - (32 - 2 + 1 - 2)) / 64  # of the others, 2 of each ten were right before
    assert found["latent"]["last"]["value"] == pytest.approx(rise)
