"""The flags of each verb: `diffit VERB` and launch/VERB.py call a module's `run`."""
