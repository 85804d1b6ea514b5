"""Is a merged model what it is said to be: any folder, of any tool, beside its base and what was merged into it."""
