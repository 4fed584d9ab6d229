"""Records of runs in; tables out. Knows nothing of torch: what comes in is JSON, one file a run."""
