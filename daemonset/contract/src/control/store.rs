//! Limits of the broker's key-value store.

/// Most bytes of a key.
pub const MAX_KEY: usize = 256;
/// Most bytes of a value.
pub const MAX_VALUE: usize = 1 << 20;
/// Most keys.
pub const MAX_KEYS: usize = 4096;
/// Most bytes of all keys and values.
pub const MAX_TOTAL: usize = 16 << 20;
