"""The scenario factory: from seeds to a clean, deduplicated, balanced set. It works on raw records, so unknown keys are kept."""
