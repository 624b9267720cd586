"""One file per sparse training method: it says only how the method differs. Its row is in `s2sam.method_rows`."""
