"""The scenario factory: from seeds to a clean, deduplicated, balanced set of scenarios. Everything here works on raw records (the
JSON objects of the files), so that what it does not know it keeps."""
