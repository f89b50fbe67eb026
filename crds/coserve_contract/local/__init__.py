"""The store of jobs as one SQLite file, for a server that has neither Redis nor Kubernetes.

Outcomes are those of the Lua scripts. What differs: nobody else writes here, so that messages are parsed inside the
transaction and no write is refused as `changed`; and the lease has no time to live, since the lock on the directory
says that its holder lives.
"""
