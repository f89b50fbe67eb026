"""Custom resources and the messages, keys and scripts that go through Redis.

The custom resources are `endpoint` and `job`; what crosses Redis is `keys`, `messages`, `shards`, `scripts`, `store`
and `acl`.
"""
