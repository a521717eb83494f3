"""Ray: replicas behind Ray Serve with one session store, and batches of Ray Data."""
