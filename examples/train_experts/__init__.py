"""Fine-tunes the experts of a pool from JSONL, one model for each file; see `docs/how-to/train-experts.md`."""
