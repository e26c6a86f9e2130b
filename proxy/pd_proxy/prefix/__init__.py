"""The prefix index: prompts as chained hashes, and which engine is believed to hold which of them. No I/O."""
