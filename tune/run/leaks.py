"""Placement groups that outlive the actor that made them.

Ray removes a placement group when the job that made it ends, not when only the actor does. So the one that Ray Train
has made for a trial's workers stays when the trial's actor is killed, and with it their CPUs; Ray Train's own cleaner
needs the dashboard.
"""

from __future__ import annotations

import time

LOOK_S = 2.0  # seconds between two looks


class Orphans:
    """Finds and removes them."""

    def __init__(self) -> None:
        self._looked = float("-inf")

    def remove(self) -> None:
        """Remove this job's placement groups whose actor has died; looks only now and then."""
        if time.monotonic() - self._looked < LOOK_S:
            return
        self._looked = time.monotonic()
        import ray
        from ray.util.placement_group import PlacementGroup, remove_placement_group

        for group in orphans():
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group)))


def orphans() -> list[bytes]:
    """The ids of this job's placement groups that an actor has made which is dead now."""
    import ray
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData

    job = ray.get_runtime_context().get_job_id()
    # the public table does not say who made them
    texts = state._connect_and_get_accessor().get_placement_group_table()
    groups = [PlacementGroupTableData.FromString(text) for text in texts]
    return [
        group.placement_group_id
        for group in groups
        if group.creator_job_id.hex() == job
        and group.creator_actor_dead
        and not ray.ActorID(group.creator_actor_id).is_nil()  # else the driver has made it
        and group.state != PlacementGroupTableData.REMOVED
    ]
