"""Where the KV lives: page pool, page tables, prefix index."""
