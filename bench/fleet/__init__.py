"""A fleet in virtual time: placement policies side by side, with an oracle. Run it with `python -m bench.fleet`.

One concept a file: `clock` (events), `blocks` (prefix caches), `prompts`, `jobs`, `prefill` and `decode` (engines),
`traffic` (traces), `kinds` (fleets and traffic), `fleet` (one run), `gateway` (this gateway's own placement, driven as
it is), `peers` (other gateways' rules), `oracle`, `report`.
"""
