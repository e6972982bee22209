"""Token ids in, token ids out: schedule, forward, sample, append."""
