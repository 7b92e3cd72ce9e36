"""Accuracy of any classifier under attack, which samples withstand, and whether the numbers can be believed.

    report = evaluate(model, loader, "clean,pgd-20,autoattack", eps=8 / 255)
    report["pgd-20"]["accuracy"]

``loader`` is anything that yields batches (x, y): x floating ``[B, ...]`` in [0, 1], y int64 ``[B]``, on the model's
device, and is read once. Put the normalisation in front of a model that takes normalised inputs. The attacks are in the
linf ball, or with ``norm="l2"`` in that of l2; :class:`Attack` lists them. Every function leaves the model, its
gradients and all random generators as they were, and gives the same numbers for the same batches and seed.

==========================  ==========================================================================================
:func:`evaluate`            accuracy under each attack, as a report of plain numbers
:func:`outcomes`            which samples withstand each attack; :func:`worst_case` turns that into one accuracy
:func:`masking_check`       whether masked gradients may have made the attacks look weak
:func:`measure_e_lin`       the local linearity error E_lin
:func:`check_inputs`        whether the model seems to take normalized inputs
:func:`accuracy_curve`      accuracy as the radius grows, from 0 to :func:`default_radii`'s last
:func:`predictions`         the class of each undisturbed sample; :func:`by_class` and :func:`write_per_sample` use them
:func:`interval`            the 95 % interval of an accuracy
:func:`attacked_examples`   what attacks do to a few samples, such as those that :func:`pick` chooses
:func:`page`                a report of all that as one HTML file; :func:`write_page` writes it
:func:`in_precision`        the model in bf16 or fp16, to evaluate it faster
:func:`parse_attacks`       names as a list, to find a bad name or a missing package before the training
:func:`radius`              eps, checked to be a radius
==========================  ==========================================================================================
"""

from elle_fast.evaluation.accuracy import Outcome, evaluate, measure_e_lin, outcomes, worst_case
from elle_fast.evaluation.chunks import Chunks
from elle_fast.evaluation.curve import accuracy_curve, default_radii
from elle_fast.evaluation.examples import Example, attacked_examples, pick
from elle_fast.evaluation.inputs import Suspicion, check_inputs
from elle_fast.evaluation.low_precision import in_precision
from elle_fast.evaluation.masking import masking_check
from elle_fast.evaluation.names import BOUNDS, DEFAULT_ATTACKS, Attack, parse_attacks, radius
from elle_fast.evaluation.predictions import by_class, interval, predictions, write_per_sample
from elle_fast.evaluation.report import page, write_page

__all__ = [
    "BOUNDS",
    "DEFAULT_ATTACKS",
    "Attack",
    "Chunks",
    "Example",
    "Outcome",
    "Suspicion",
    "accuracy_curve",
    "attacked_examples",
    "by_class",
    "check_inputs",
    "default_radii",
    "evaluate",
    "in_precision",
    "interval",
    "masking_check",
    "measure_e_lin",
    "outcomes",
    "page",
    "parse_attacks",
    "pick",
    "predictions",
    "radius",
    "worst_case",
    "write_page",
    "write_per_sample",
]
