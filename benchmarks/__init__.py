"""One file per group of claims; `claims.toml` lists every bar."""
