"""What engines have of a prompt already: chained hashes of prompts, and an index of who holds which. No I/O."""
