"""The one loop that every system with a learned prior runs in: schedules, sampler rules, data consistency, constraints."""
