"""Which tuned model is the best so far, and when to stop."""

from dataclasses import dataclass, field
from typing import Any

from marval.presets import TuneConfig

SCORES = ("held_out", "log_probability")  # figures of which the best model has the highest; the first that is there


@dataclass
class Keeper:
    """Watches held-out figures: which model was best, and when to stop.

    A model counts when its Fréchet distance and its diversity stay within the settings' ratios of the student's. The
    best is the one with the highest held-out score: the mean of the held-out reward, else the log-probability that
    the held-out classifier gives; where there is neither, the latest that counts. A figure that could not be measured
    (no class with two images has no diversity) decides nothing.

    Args:
        by_distance: what is tuned are distances alone: without a held-out reward, the lowest (held-out) one is best.
    """

    settings: TuneConfig
    by_distance: bool = False
    first: dict[str, float] = field(default_factory=dict)  # the figures of the student
    best: float = float("-inf")  # the highest held-out score
    stale: int = 0  # probes since then
    stopped: str = ""  # why to stop, or ""

    def see(self, figures: dict[str, float]) -> bool:
        """Take a probe's figures; True when this model is the best so far."""
        self.first = self.first or figures
        fd, diversity = (self._ratio(name, figures) for name in ("fd", "diversity"))
        score = self._score(figures)
        if fd is not None and fd > self.settings.max_distance_ratio:
            self.stopped = f"the Fréchet distance rose to {fd:.2f} times the student's"
        elif diversity is not None and diversity < self.settings.min_diversity_ratio:
            self.stopped = f"the diversity fell to {diversity:.2f} times the student's"
        elif score is None or score > self.best:
            self.best, self.stale = self.best if score is None else score, 0
            return True
        else:
            self.stale += 1
            if self.stale >= self.settings.patience:
                what = "distance did not fall" if self._on_distance(figures) else "reward did not rise"
                self.stopped = f"the held-out {what} in {self.stale} probes"
        return False

    def _on_distance(self, figures: dict[str, float]) -> bool:
        """Whether the distance is the score."""
        return self.by_distance and "fd" in figures and "held_out" not in figures

    def _score(self, figures: dict[str, float]) -> float | None:
        """The held-out score; None where nothing gives one."""
        if self._on_distance(figures):
            return -figures["fd"]
        return next((figures[name] for name in SCORES if name in figures), None)

    def _ratio(self, name: str, figures: dict[str, float]) -> float | None:
        """A figure over the student's; None where one of them is missing."""
        return figures[name] / self.first[name] if name in figures and self.first.get(name) else None

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs beside the settings."""
        return {"first": self.first, "best": self.best, "stale": self.stale, "stopped": self.stopped}
