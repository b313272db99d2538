"""Make every page of the study from its tables: `make study`.

A page is a function of the tables in docs/study/results alone. Nothing here trains.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from choose import RESULTS
from claims import better, claim_one
from more_tasks import encoder, vision
from noise import noise
from overview import PAGE, overview
from pilot import pilot
from pretrained_page import pretrained
from questions import hybrid, longer, low_sparsity, panels, phases, rule
from rivals import rivals
from smollm import language_model
from spending import equal_flops, sparsest
from tables import PAGES
from tuning import tuning

BUILT: dict[str, tuple[Callable[[], str], str]] = {
    "tuning.md": (tuning, "*-rates"),
    "a-recipes.md": (claim_one, "*-main-*"),
    "b-equal-flops.md": (equal_flops, "lm-flops"),
    "c-sparsest.md": (sparsest, "lm-main-2-4"),
    "d-noise.md": (noise, "lm-noise"),
    "e-gradient-rule.md": (rule, "lm-rule"),
    "f-phases.md": (phases, "lm-phases"),
    "g-hybrid.md": (hybrid, "lm-main-1-16"),
    "h-low-sparsity.md": (low_sparsity, "lm-main-2-4"),
    "j-panels.md": (panels, "lm-panels"),
    "m-longer.md": (longer, "lm-long"),
    "pilot.md": (pilot, "lm-pilot"),
    "settling.md": (better, "*-main-*"),
    "l-smaller-dense.md": (rivals, "*-dense"),
    "n-pretrained.md": (pretrained, "*-rates"),
    "o-language-model.md": (language_model, "smollm*"),
    "p-vision.md": (vision, "vision"),
    "q-encoder.md": (encoder, "encoder"),
}
"""Each page, what makes it, and the tables without which there is no page."""


def main() -> None:
    """Write the pages that have something to say."""
    for name, (build, needed) in BUILT.items():
        if not list(RESULTS.glob(f"{needed}/results.parquet")):
            sys.stdout.write(f"{name}: not run yet\n")
            continue
        (PAGES / name).write_text(build().rstrip() + "\n", encoding="utf-8")
        sys.stdout.write(f"{name}: written\n")
    PAGE.write_text(overview(), encoding="utf-8")
    sys.stdout.write(f"{PAGE.name} of docs/explained: tables written\n")


if __name__ == "__main__":
    main()
