"""Replicas as the operator names them: by number, from 0."""

from __future__ import annotations

from cocktail_serve.errors import NotFoundError


def check_replica(replica: int | None, *, num_replicas: int = 1) -> None:
    """Raises NotFoundError for a replica that a pool does not have; None stands for all that it has."""
    if replica is not None and not 0 <= replica < num_replicas:
        have = "one replica, 0" if num_replicas == 1 else f"replicas 0 to {num_replicas - 1}"
        raise NotFoundError(
            f"there is no replica {replica}: the pool has {have}", param="replica", code="replica_not_found"
        )
