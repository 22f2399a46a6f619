"""The tables, as migrations: the database's user_version counts those that were applied."""
from __future__ import annotations

# Statuses of a message. Only "streaming" changes without a person's doing; a start turns what is left of it into
# "interrupted".
STATUSES = ("complete", "streaming", "stopped", "length", "interrupted", "error")
# Rowids of the search index: one table for three kinds of texts, 4 * id + kind.
MESSAGE, TITLE, ATTACHMENT = 0, 1, 2

_FIRST = """
CREATE TABLE folders (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL
);
CREATE TABLE conversations (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    title TEXT NOT NULL,
    folder INTEGER REFERENCES folders(id) ON DELETE SET NULL,
    pinned INTEGER NOT NULL DEFAULT 0,
    system_prompt TEXT NOT NULL DEFAULT '',
    sampling TEXT NOT NULL DEFAULT '{}',
    preset INTEGER,
    leaf INTEGER,
    created REAL NOT NULL,
    updated REAL NOT NULL
);
CREATE TABLE messages (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    conversation INTEGER NOT NULL REFERENCES conversations(id) ON DELETE CASCADE,
    -- no cascade: SQLite's goes a thousand levels deep, long conversations deeper
    parent INTEGER REFERENCES messages(id) DEFERRABLE INITIALLY DEFERRED,
    role TEXT NOT NULL CHECK (role IN ('user', 'assistant')),
    content TEXT NOT NULL,
    status TEXT NOT NULL,
    error TEXT,
    model TEXT,
    stats TEXT,
    created REAL NOT NULL
);
CREATE INDEX messages_of_conversation ON messages(conversation);
CREATE INDEX messages_of_parent ON messages(parent);
CREATE INDEX messages_streaming ON messages(status) WHERE status = 'streaming';
CREATE TABLE attachments (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    message INTEGER REFERENCES messages(id) ON DELETE CASCADE,
    draft TEXT,
    name TEXT NOT NULL,
    kind TEXT NOT NULL,
    text TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    created REAL NOT NULL
);
CREATE INDEX attachments_of_message ON attachments(message);
CREATE INDEX attachments_of_draft ON attachments(draft);
CREATE TABLE drafts (
    key TEXT PRIMARY KEY,
    text TEXT NOT NULL,
    updated REAL NOT NULL
);
CREATE TABLE presets (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL,
    system_prompt TEXT NOT NULL DEFAULT '',
    sampling TEXT NOT NULL DEFAULT '{}',
    builtin INTEGER NOT NULL DEFAULT 0
);
INSERT INTO presets (name, sampling, builtin) VALUES
    ('Precise', '{"temperature": 0}', 1),
    ('Balanced', '{"temperature": 0.7, "top_p": 0.95}', 1),
    ('Creative', '{"temperature": 1.0, "top_p": 0.98, "min_p": 0.02}', 1);
CREATE TABLE settings (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL
);
CREATE VIRTUAL TABLE search USING fts5(text, conversation UNINDEXED, tokenize = 'unicode61 remove_diacritics 2',
                                       prefix = '2 3');
-- A reply is indexed when it has come to its end, not ten times a second on the way.
CREATE TRIGGER message_added AFTER INSERT ON messages WHEN new.status <> 'streaming' BEGIN
    INSERT INTO search (rowid, text, conversation) VALUES (4 * new.id, new.content, new.conversation);
END;
CREATE TRIGGER message_changed AFTER UPDATE OF content, status ON messages WHEN new.status <> 'streaming' BEGIN
    DELETE FROM search WHERE rowid = 4 * new.id;
    INSERT INTO search (rowid, text, conversation) VALUES (4 * new.id, new.content, new.conversation);
END;
CREATE TRIGGER message_gone AFTER DELETE ON messages BEGIN
    DELETE FROM search WHERE rowid = 4 * old.id;
END;
CREATE TRIGGER conversation_added AFTER INSERT ON conversations BEGIN
    INSERT INTO search (rowid, text, conversation) VALUES (4 * new.id + 1, new.title, new.id);
END;
CREATE TRIGGER conversation_renamed AFTER UPDATE OF title ON conversations BEGIN
    UPDATE search SET text = new.title WHERE rowid = 4 * new.id + 1;
END;
CREATE TRIGGER conversation_gone AFTER DELETE ON conversations BEGIN
    DELETE FROM search WHERE rowid = 4 * old.id + 1;
END;
CREATE TRIGGER attachment_sent AFTER UPDATE OF message ON attachments WHEN new.message IS NOT NULL BEGIN
    DELETE FROM search WHERE rowid = 4 * new.id + 2;
    INSERT INTO search (rowid, text, conversation) SELECT 4 * new.id + 2, new.name || char(10) || new.text, conversation
        FROM messages WHERE id = new.message;
END;
CREATE TRIGGER attachment_added AFTER INSERT ON attachments WHEN new.message IS NOT NULL BEGIN
    INSERT INTO search (rowid, text, conversation) SELECT 4 * new.id + 2, new.name || char(10) || new.text, conversation
        FROM messages WHERE id = new.message;
END;
CREATE TRIGGER attachment_gone AFTER DELETE ON attachments BEGIN
    DELETE FROM search WHERE rowid = 4 * old.id + 2;
END;
"""

MIGRATIONS: tuple[str, ...] = (_FIRST,)
