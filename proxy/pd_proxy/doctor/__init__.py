"""`pd-proxy doctor`: asks every engine what it is, hands KV caches over between them, and says what is wrong."""
