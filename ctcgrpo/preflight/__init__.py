"""What a run will need and cost, before it takes anything: memory by part, calls, tokens, money, hours; what would fail later."""
