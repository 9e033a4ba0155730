"""Who may use an engine, and when: turns, slots, and what the operator has laid on it."""
