//! File content that host and guest can compute from the file's name.

/// Name of the file with content number `seed` and `length` bytes.
pub fn name(seed: u64, length: u64) -> String {
    format!("p-{seed}-{length}")
}

/// Seed and length from such a file name; `None` for any other name.
pub fn parse(name: &str) -> Option<(u64, u64)> {
    let (seed, length) = name.strip_prefix("p-")?.split_once('-')?;
    Some((seed.parse().ok()?, length.parse().ok()?))
}

/// The whole content of such a file.
pub fn content(seed: u64, length: u64) -> Vec<u8> {
    (0..length.div_ceil(8)).flat_map(|word| mixed(seed, word).to_le_bytes()).take(length as usize).collect()
}

/// The finalizer of SplitMix64. Adjacent words have no common byte pattern, so a shifted or stale page is detected.
fn mixed(seed: u64, word: u64) -> u64 {
    let mut z = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(word);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
