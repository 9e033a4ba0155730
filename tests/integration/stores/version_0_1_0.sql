-- the tables as version 0.1.0 made them on SQLite, with a row in each
CREATE TABLE schema_info (
    version INTEGER NOT NULL,
    PRIMARY KEY (version)
);
CREATE TABLE cocktails (
    uid VARCHAR(32) NOT NULL,
    tenant VARCHAR(255) NOT NULL,
    name VARCHAR(64) NOT NULL,
    pool_id VARCHAR(64) NOT NULL,
    kind VARCHAR(16) NOT NULL,
    digest VARCHAR(64) NOT NULL,
    request JSON NOT NULL,
    created_at FLOAT NOT NULL,
    ready_at FLOAT,
    used_at FLOAT NOT NULL,
    sequence BIGINT NOT NULL,
    status VARCHAR(16) NOT NULL,
    progress FLOAT NOT NULL,
    losses JSON NOT NULL,
    merging_weights JSON,
    entropy FLOAT,
    mixed_loss FLOAT,
    recipe JSON,
    error JSON,
    warnings JSON NOT NULL,
    PRIMARY KEY (uid),
    UNIQUE (tenant, name, digest)
);
CREATE TABLE losses (
    tenant VARCHAR(255) NOT NULL,
    item VARCHAR(64) NOT NULL,
    model VARCHAR(64) NOT NULL,
    variant VARCHAR(64) NOT NULL,
    loss FLOAT NOT NULL,
    PRIMARY KEY (tenant, item, model, variant)
);
CREATE TABLE embeddings (
    tenant VARCHAR(255) NOT NULL,
    item VARCHAR(64) NOT NULL,
    model VARCHAR(64) NOT NULL,
    variant VARCHAR(64) NOT NULL,
    vector BLOB NOT NULL,
    PRIMARY KEY (tenant, item, model, variant)
);
CREATE TABLE examples (
    uid VARCHAR(32) NOT NULL,
    position INTEGER NOT NULL,
    body JSON NOT NULL,
    PRIMARY KEY (uid, position),
    FOREIGN KEY(uid) REFERENCES cocktails (uid) ON DELETE CASCADE
);
CREATE TABLE items (
    uid VARCHAR(32) NOT NULL,
    item VARCHAR(64) NOT NULL,
    PRIMARY KEY (uid, item),
    FOREIGN KEY(uid) REFERENCES cocktails (uid) ON DELETE CASCADE
);
CREATE INDEX ix_items_item ON items (item);
CREATE TABLE pins (
    tenant VARCHAR(255) NOT NULL,
    name VARCHAR(64) NOT NULL,
    uid VARCHAR(32) NOT NULL,
    PRIMARY KEY (tenant, name),
    FOREIGN KEY(uid) REFERENCES cocktails (uid) ON DELETE CASCADE
);
INSERT INTO schema_info VALUES (1);
INSERT INTO cocktails VALUES ('1', 'default', 'films', 'flan', 'decoder', 'd1', '{"name": "films"}', 1700000000.5, NULL, 1700000000.5, 1, 'queued', 0.0, '{}', NULL, NULL, NULL, NULL, NULL, '[]');
INSERT INTO examples VALUES ('1', 0, '{"input": "a", "output": "b"}');
INSERT INTO items VALUES ('1', 'i1');
INSERT INTO pins VALUES ('default', 'films', '1');
INSERT INTO losses VALUES ('default', 'i1', 'm', 'v', 1.25);
INSERT INTO embeddings VALUES ('default', 'i1', 'm', 'v', x'0000803f');
