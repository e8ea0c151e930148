"""The study: expressive attention against dot-product attention, on tasks of growing difficulty.

`config` says what is compared, `sweep` runs it, `store` keeps what is finished, `results` hands it to
`statistics`, `figures` and `report`; `cli` is the command ``ea``.
"""
