"""Who starts, knows and ends the servers of a run: SGLang's, over HTTP."""
