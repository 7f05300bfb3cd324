"""Opposed principles of the sandbox world, in the wording its model was trained on."""

from collections.abc import Sequence
from typing import Literal

from sso_lightning.errors import InputError
from sso_lightning.principles import Draw, PrincipleSource, Steering
from sso_lightning.records import Query
from sso_lightning.sandbox import world


class SandboxPrinciples(PrincipleSource):
    """Features of the sandbox at random, with a wording of each side.

    The bad side of safety asks for a careless but harmless sentence.
    """

    name = "sandbox"
    safety_mode = "careless"

    def __init__(
        self,
        count: int = 2,
        paraphrase: Literal["seen", "held_out"] = "seen",
        features: list[str] | None = None,
    ) -> None:
        """Set the source up.

        Args:
            count: Features named in each query's principles.
            paraphrase: Wordings the base model was trained on, or wordings new to it.
            features: Names of the features to draw from; None draws from all.

        Raises:
            InputError: If a name is unknown or twice, or `count` does not fit the features.
        """
        pool = [each.name for each in world.FEATURES] if features is None else features
        self.features = tuple(world.feature(name) for name in pool)
        if len(set(pool)) < len(pool):
            raise InputError("principles.features names a feature twice")
        if not 1 <= count <= len(pool):
            raise InputError(
                f"principles.count must be between 1 and the {len(pool)} features, got {count}"
            )
        if paraphrase not in ("seen", "held_out"):
            raise InputError(f"principles.paraphrase must be seen or held_out, got {paraphrase!r}")
        self.count = count
        self.paraphrase = paraphrase

    def propose(self, queries: Sequence[Query], draw: Draw) -> list[Steering]:
        """See `PrincipleSource.propose`; the policy is not asked."""
        return [self._steer(query, draw) for query in queries]

    def _steer(self, query: Query, draw: Draw) -> Steering:
        rng = draw.rng(query.id, "principles")
        picked = rng.sample(self.features, self.count)
        held_out = self.paraphrase == "held_out"
        good, bad = (
            [world.worded(each, side, rng, held_out=held_out) for each in picked]
            for side in (True, False)
        )
        return Steering(
            features=tuple(each.name for each in picked),
            good_principle="\n".join(good),
            bad_principle="\n".join(bad),
            good_system=world.system_message(good),
            bad_system=world.system_message(bad),
            adjectives=tuple(each.good_adjective for each in picked)
            + tuple(each.bad_adjective for each in picked),
        )
