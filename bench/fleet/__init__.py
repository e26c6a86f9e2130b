"""A fleet in virtual time: placement policies side by side, with an oracle. Run it with `python -m bench.fleet`.

Each file has one concept: `clock` (events), `blocks` (prefix caches), `prompts`, `jobs`, `prefill` and `decode`
(engines), `traffic` (traces), `kinds` (fleets and traffic), `fleet` (one run), `gateway` (this gateway's own placement
code), `peers` (other gateways' rules), `oracle`, `report`.
"""
