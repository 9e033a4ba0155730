"""Every table. A change here needs a revision in `migrations/versions`; a test compares the two."""

from __future__ import annotations

import functools

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Date,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData()

DIGEST = String(64)
TENANT = String(255)
GATEWAY = String(32)
KEY_ID = String(12)

cocktails = Table(
    "cocktails",
    metadata,
    Column("uid", String(32), primary_key=True),
    Column("tenant", TENANT, nullable=False),
    Column("name", String(64), nullable=False),
    Column("pool_id", String(64), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("digest", DIGEST, nullable=False),
    Column("request", JSON, nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("ready_at", Float(53)),
    Column("used_at", Float(53), nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("status", String(16), nullable=False),
    Column("progress", Float(53), nullable=False),
    Column("losses", JSON, nullable=False),
    Column("merging_weights", JSON(none_as_null=True)),
    Column("entropy", Float(53)),
    Column("mixed_loss", Float(53)),
    Column("validation_loss", Float(53)),
    Column("recipe", JSON(none_as_null=True)),
    Column("error", JSON(none_as_null=True)),
    Column("warnings", JSON, nullable=False),
    Column("candidates", JSON(none_as_null=True)),
    Column("owner", GATEWAY),
    Column("epoch", BigInteger, nullable=False, server_default="0"),
    Column("change", BigInteger, nullable=False, server_default="0"),
    Column("findings", JSON(none_as_null=True)),
    Column("key_id", KEY_ID),
    Column("example_bytes", BigInteger, nullable=False, server_default="0"),
    UniqueConstraint("tenant", "name", "digest"),
    Index("ix_cocktails_change", "change"),
)

_uid_of_cocktail = functools.partial(ForeignKey, "cocktails.uid", ondelete="CASCADE")


def _rows_of_cocktail(name: str) -> Table:
    return Table(
        name,
        metadata,
        Column("uid", String(32), _uid_of_cocktail(), primary_key=True),
        Column("position", Integer, primary_key=True),
        Column("body", JSON, nullable=False),
    )


examples = _rows_of_cocktail("examples")
validation_examples = _rows_of_cocktail("validation_examples")

items = Table(
    "items",
    metadata,
    Column("uid", String(32), _uid_of_cocktail(), primary_key=True),
    Column("item", DIGEST, primary_key=True),
    Index("ix_items_item", "item"),
)
"""What a cocktail's scores are kept under (an example's or a text's digest), so that deletion finds them."""

pins = Table(
    "pins",
    metadata,
    Column("tenant", TENANT, primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("uid", String(32), _uid_of_cocktail(), nullable=False),
)


def _score_key() -> tuple[Column[str], ...]:
    """What a score is kept under, as primary key."""
    return (
        Column("tenant", TENANT, primary_key=True),
        Column("item", DIGEST, primary_key=True),
        Column("model", DIGEST, primary_key=True),
        Column("variant", DIGEST, primary_key=True),
    )


losses = Table("losses", metadata, *_score_key(), Column("loss", Float(53), nullable=False))
embeddings = Table("embeddings", metadata, *_score_key(), Column("vector", LargeBinary, nullable=False))

files = Table(
    "files",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("tenant", TENANT, nullable=False),
    Column("filename", String(255), nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Column("digest", DIGEST, nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("expires_at", Float(53)),
    Column("purpose", String(32), nullable=False, server_default="fine-tune"),
    Index("ix_files_tenant_digest", "tenant", "digest"),
)

file_contents = Table(
    "file_contents",
    metadata,
    Column("tenant", TENANT, primary_key=True),
    Column("digest", DIGEST, primary_key=True),
    Column("content", LargeBinary, nullable=False),
)
"""By content, so that a file uploaded twice lies here once; apart from `files`, so that listing reads no content."""

fine_tuning_jobs = Table(
    "fine_tuning_jobs",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("tenant", TENANT, nullable=False),
    Column("uid", String(32), ForeignKey("cocktails.uid", ondelete="SET NULL")),
    Column("cocktail_id", String(80), nullable=False),
    Column("request", JSON, nullable=False),
    Column("request_digest", DIGEST, nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("status", String(16), nullable=False),
    Column("finished_at", Float(53)),
    Column("error", JSON(none_as_null=True)),
    Index("ix_fine_tuning_jobs_tenant", "tenant", "id"),
    Index("ix_fine_tuning_jobs_digest", "tenant", "request_digest"),
    Index("ix_fine_tuning_jobs_uid", "uid"),
)
"""They outlast their cocktails; `uid` is null where the cocktail has been deleted."""

_id_of_job = functools.partial(ForeignKey, "fine_tuning_jobs.id", ondelete="CASCADE")

fine_tuning_metadata = Table(
    "fine_tuning_metadata",
    metadata,
    Column("job_id", String(40), _id_of_job(), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("value", String(512), nullable=False),
)
"""The pairs of a job's request once more, to find jobs by."""

fine_tuning_events = Table(
    "fine_tuning_events",
    metadata,
    Column("job_id", String(40), _id_of_job(), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("created_at", Float(53), nullable=False),
    Column("level", String(8), nullable=False),
    Column("message", Text, nullable=False),
    Column("data", JSON(none_as_null=True)),
    Column("is_metrics", Boolean, nullable=False),
)

batches = Table(
    "batches",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("tenant", TENANT, nullable=False),
    Column("key_id", KEY_ID),
    Column("endpoint", String(64), nullable=False),
    Column("input_file_id", String(40), nullable=False),
    Column("completion_window", String(8), nullable=False),
    Column("metadata", JSON(none_as_null=True)),
    Column("output_expires_after_s", Integer),
    Column("status", String(16), nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("expires_at", Float(53), nullable=False),
    Column("in_progress_at", Float(53)),
    Column("finalizing_at", Float(53)),
    Column("completed_at", Float(53)),
    Column("failed_at", Float(53)),
    Column("expired_at", Float(53)),
    Column("cancelling_at", Float(53)),
    Column("cancelled_at", Float(53)),
    Column("num_total", Integer, nullable=False, server_default="0"),
    Column("num_completed", Integer, nullable=False, server_default="0"),
    Column("num_failed", Integer, nullable=False, server_default="0"),
    Column("output_file_id", String(40)),
    Column("error_file_id", String(40)),
    Column("errors", JSON(none_as_null=True)),
    Column("owner", GATEWAY),
    Column("epoch", BigInteger, nullable=False, server_default="0"),
    Index("ix_batches_tenant", "tenant", "id"),
    Index("ix_batches_status", "status"),
)

batch_lines = Table(
    "batch_lines",
    metadata,
    Column("batch_id", String(40), ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("model", DIGEST, nullable=False),
    Column("request", LargeBinary),
    Column("answer", LargeBinary),
    Column("is_error", Boolean),
)
"""While a batch is worked on: each line has its request until it has its answer. Then they are in its output files."""

tenants = Table(
    "tenants",
    metadata,
    Column("name", TENANT, primary_key=True),
    Column("pools", JSON(none_as_null=True)),
    Column("limits", JSON(none_as_null=True)),
    Column("created_at", Float(53), nullable=False),
)

keys = Table(
    "keys",
    metadata,
    Column("id", KEY_ID, primary_key=True),
    Column("tenant", TENANT, ForeignKey("tenants.name"), nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("digest", DIGEST, nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("expires_at", Float(53)),
    Column("revoked_at", Float(53)),
    Index("ix_keys_tenant", "tenant"),
)
"""Of a key itself only the digest is there."""

gateways = Table(
    "gateways",
    metadata,
    Column("id", GATEWAY, primary_key=True),
    Column("place", String(32), nullable=False),
    Column("beat", BigInteger, nullable=False),
)

removals = Table(
    "removals",
    metadata,
    Column("uid", String(32), primary_key=True),
    Column("change", BigInteger, nullable=False),
    Index("ix_removals_change", "change"),
)
"""Cocktails that are gone, for the gateways that have not heard of it. Says neither whose they were nor what."""

changes = Table(
    "changes",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("last", BigInteger, nullable=False),
    Column("forgotten", BigInteger, nullable=False),
)
"""One row: the number of the last change of cocktails, and of the last removal that is no longer in `removals`."""

experts = Table(
    "experts",
    metadata,
    Column("pool", String(64), primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("path", Text, nullable=False),
    Column("fingerprint", DIGEST, nullable=False),
    Column("added_at", Float(53), nullable=False),
)
"""Those added while the server ran; those of the configuration are in the configuration."""

usage = Table(
    "usage",
    metadata,
    Column("tenant", TENANT, primary_key=True),
    Column("day", Date, primary_key=True),
    Column("key_id", KEY_ID, primary_key=True),
    Column("model", String(160), primary_key=True),
    Column("pool", String(64), nullable=False),
    Column("requests", BigInteger, nullable=False),
    Column("tokens_in", BigInteger, nullable=False),
    Column("tokens_out", BigInteger, nullable=False),
    Column("scoring_s", Float(53), nullable=False),
    Column("mixing_s", Float(53), nullable=False),
    Index("ix_usage_day", "day"),
)
"""Sums by day; a batch adds to them."""

usage_writers = Table(
    "usage_writers",
    metadata,
    Column("writer", String(32), primary_key=True),
    Column("last", BigInteger, nullable=False),
    Column("written_at", Float(53), nullable=False),
)
"""The number of the last batch that each process added, so that none is added twice."""

audit = Table(
    "audit",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("at", Float(53), nullable=False),
    Column("actor_tenant", TENANT),
    Column("actor_key", KEY_ID),
    Column("action", String(32), nullable=False),
    Column("tenant", TENANT),
    Column("subject", String(255), nullable=False),
    Column("detail", JSON, nullable=False),
    Index("ix_audit_tenant", "tenant", "id"),
)
"""Nothing refers to it, and it to nothing: it outlives what it tells of."""
