"""The flags of each verb, and which function of another room it calls."""
