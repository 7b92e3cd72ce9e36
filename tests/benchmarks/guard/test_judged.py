"""What benchmarks/guard/judged.py says of probes made up here."""

from __future__ import annotations

from typing import Any

from benchmarks.guard.judged import SAME, has_fallen, judged, onset


def probes(robust, train_adv=0.4):
    """One every 25 steps."""
    adv = [train_adv] * len(robust) if isinstance(train_adv, float) else train_adv
    return [[25 * (i + 1), 0.5, each, by] for i, (each, by) in enumerate(zip(robust, adv, strict=True))]


def run(robust, *, at_the_end=0.2, alarms=(), **more) -> dict[str, Any]:
    found = [{"step": step, "signal": "linearity", "value": 0.3, "limit": 0.2, "back_to": 1} for step in alarms]
    accuracy = {"clean": 0.5, "pgd-20": at_the_end, "pgd-50-10": at_the_end}
    return {"ended": "whole", "probes": probes(robust), "accuracy": accuracy, "alarms": found, **more}


STANDS = [0.05, 0.1, 0.15, 0.2, 0.2, 0.2, *[0.21] * 20]
LOST = [*STANDS[:10], 0.16, 0.12, *[0.01] * 14]  # the twelfth is the first below two thirds of 0.21


def test_a_loss_begins_at_the_first_probe_that_stays_below_two_thirds():
    assert onset(probes(STANDS)) == ("stands", None, 0.21)
    assert onset(probes(LOST)) == ("lost", 12 * 25, 0.21)
    # A dip that is over within twelve probes is none.
    dip = [*STANDS[:10], *[0.0] * 11, *[0.2] * 14]
    assert onset(probes(dip)).fate == "stands"
    assert onset(probes([*STANDS[:10], *[0.0] * 12, *[0.2] * 14])).step == 11 * 25
    # One below two thirds that never is below half is none either.
    assert onset(probes([*STANDS[:10], *[0.11] * 16])).fate == "stands"


def test_at_the_end_four_probes_show_a_loss():
    assert onset(probes([*STANDS[:20], *[0.01] * 4])).step == 21 * 25
    assert onset(probes([*STANDS[:20], *[0.01] * 3])).step is None
    assert onset(probes([*STANDS[:20], 0.0]), "nan").step == 21 * 25


def test_a_training_that_never_was_robust_collapses_where_its_attack_and_pgd_part():
    robust, adv = [0.0, 0.02, 0.05, *[0.02] * 20], [0.05, 0.1, 0.12, 0.14, 0.16, *[0.5] * 18]
    assert onset(probes(robust, adv)) == ("never robust", 5 * 25, 0.02)
    assert onset(probes(robust, 0.05)).step is None
    # 0.05 is no less than a quarter of 0.16; with it in between, it begins after it.
    late = [*robust[:8], 0.3, *robust[9:]]
    assert onset(probes(late, adv)).step == 10 * 25
    assert onset(probes([0.0], 0.1), "nan") == ("never robust", 25, 0.0)


def test_a_model_that_has_lost_two_thirds_of_its_best_has_fallen():
    assert not has_fallen(run(STANDS))
    assert has_fallen(run(LOST))
    assert has_fallen(run(STANDS, at_the_end=0.049))
    assert has_fallen(run(STANDS, ended="nan", accuracy={}))
    assert not has_fallen(run([*STANDS, 0.0, 0.0]))  # two bad probes are none
    assert has_fallen(run([0.3] * 5 + [0.09] * 5))
    assert not has_fallen(run([0.3] * 5 + [0.11] * 5))


def test_alarms_are_judged_by_the_run_without_the_guard():
    found = judged({"guarded": run(STANDS, alarms=[250, 700]), "alone": run(LOST)})
    assert {name: found[name] for name in ("alarms", "onset", "delay", "false_alarms", "missed")} == {
        **{"alarms": 2, "onset": 300, "delay": -50, "false_alarms": 0, "missed": False},
    }
    assert (found["fallen"], found["fallen_alone"], found["fate"]) == (False, True, "lost")
    found = judged({"guarded": run(STANDS, alarms=[250, 700]), "alone": run(STANDS)})
    assert (found["delay"], found["false_alarms"], found["missed"]) == (None, 2, False)
    # One that ends collapsed without an onset had its alarms rightly.
    found = judged({"guarded": run(STANDS, alarms=[250]), "alone": run(STANDS, at_the_end=0.01)})
    assert (found["delay"], found["false_alarms"], found["missed"]) == (None, 0, False)


def test_without_an_alarm_one_run_is_both():
    found = judged({"guarded": run(LOST), "alone": SAME})
    assert (found["missed"], found["delay"], found["fallen"], found["fallen_alone"]) == (True, None, True, True)
    found = judged({"guarded": run(STANDS), "alone": SAME})
    assert (found["missed"], found["false_alarms"], found["fallen"]) == (False, 0, False)


def test_what_is_not_known_yet_is_none():
    found = judged({"guarded": run(STANDS, alarms=[250]), "alone": None})
    assert (found["alarms"], found["fallen"]) == (1, False)
    assert {found[name] for name in found if name not in ("alarms", "fallen")} == {None}
