"""The values that one key of a sweep may take."""

from __future__ import annotations

import math
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from bootvit.config import Section

DOMAINS = ("grid", "choice", "uniform", "loguniform", "randint")
Number = Annotated[float, Field(allow_inf_nan=False)]


class Domain(Section):
    """Exactly one of grid (every value is tried), choice, uniform, loguniform and randint (drawn)."""

    read_by = ("tune/spec/domain.py", "tune/spec/space.py")
    grid: tuple[Any, ...] | None = Field(None, description="Values that are all tried, with all of the other grids'.")
    choice: tuple[Any, ...] | None = Field(None, description="Values of which one is drawn.")
    uniform: tuple[Number, Number] | None = Field(None, description="The ends of a range from which a number is drawn.")
    loguniform: tuple[Number, Number] | None = Field(
        None, description="The ends of a range, above 0, from which a number's logarithm is drawn."
    )
    randint: tuple[int, int] | None = Field(
        None, description="The ends of a range, both included, from which a whole number is drawn."
    )
    when: dict[str, Any] = Field(
        {}, description="Values of other keys (one, or a list of several) without which this key does not count."
    )

    @model_validator(mode="after")
    def _one_and_not_empty(self) -> Self:
        given = [name for name in DOMAINS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of {', '.join(DOMAINS)}" + (f", not {' and '.join(given)}" if given else "")
            )
        if self.listed:
            if not self.values:
                raise ValueError(f"{self.kind} is empty: give at least one value")
            return self
        low, high = self.values
        if low > high:
            raise ValueError(f"{self.kind}: the lower end {low:g} is above the upper end {high:g}")
        if self.kind == "loguniform" and low <= 0:
            raise ValueError(f"loguniform: the lower end {low:g} must be above 0")
        return self

    @property
    def kind(self) -> str:
        """grid, choice, uniform, loguniform or randint."""
        return next(name for name in DOMAINS if getattr(self, name) is not None)

    @property
    def listed(self) -> bool:
        """Whether the values are listed, not a range."""
        return self.kind in ("grid", "choice")

    @property
    def values(self) -> tuple[Any, ...]:
        """The listed values, or the two ends of the range."""
        return tuple(getattr(self, self.kind))

    def draw(self, u: float) -> Any:
        """The value at quantile `u`, 0 <= u < 1."""
        if self.listed:
            return self.values[int(u * len(self.values))]
        low, high = self.values
        if self.kind == "randint":
            return low + int(u * (high - low + 1))
        if self.kind == "loguniform":
            return min(high, math.exp(math.log(low) + u * (math.log(high) - math.log(low))))
        return low + u * (high - low)
