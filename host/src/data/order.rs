//! In which order the rows of an epoch are visited. The order is global: every rank computes the same one and takes its
//! part, so it does not depend on how many ranks there are.
//!
//! Two shuffles. Ours is keyed by (seed, epoch) and needs no state, so a resumed run finds its place by number alone.
//! The other is torchtune's (`compat: torchtune`): `torch.randperm` of a CPU generator seeded with the epoch, whatever
//! the config's seed says, because torchtune builds its sampler with seed 0.

use crate::error::{Error, Result};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    num_rows: u32,
    shuffle: Shuffle,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shuffle {
    /// As in the files.
    Off,
    Seeded(u64),
    Torchtune,
}

impl Order {
    /// `compat_torchtune` shuffles as torchtune does, whatever `seed` is.
    pub fn new(num_rows: usize, shuffle: bool, seed: u64, compat_torchtune: bool) -> Result<Self> {
        let shuffle = match (shuffle, compat_torchtune) {
            (false, _) => Shuffle::Off,
            (true, false) => Shuffle::Seeded(seed),
            (true, true) => Shuffle::Torchtune,
        };
        // From here on torch draws 64 bits per row instead of 32.
        const TORCH_SMALL: usize = (u32::MAX / 20) as usize;
        let too_many = |most: usize, why: &str| {
            Err(Error::config(format!("the data set has {num_rows} rows; {why} takes at most {most}")))
        };
        match u32::try_from(num_rows) {
            Err(_) => too_many(u32::MAX as usize, "an epoch"),
            Ok(_) if shuffle == Shuffle::Torchtune && num_rows >= TORCH_SMALL => {
                too_many(TORCH_SMALL - 1, "the order of `compat: torchtune`")
            }
            Ok(num_rows) => Ok(Self { num_rows, shuffle }),
        }
    }

    pub fn num_rows(&self) -> usize {
        self.num_rows as usize
    }

    /// The rows of epoch `epoch` (from 0) in the order they are visited.
    pub fn epoch(&self, epoch: usize) -> Vec<u32> {
        let mut rows: Vec<u32> = (0..self.num_rows).collect();
        match self.shuffle {
            Shuffle::Off => {}
            Shuffle::Seeded(seed) => shuffle_seeded(&mut rows, seed, epoch as u64),
            Shuffle::Torchtune => shuffle_torch(&mut rows, epoch as u64),
        }
        rows
    }
}

/// Fisher-Yates from the last place down. Draw `i` is `mix(key + i * GOLDEN)`, SplitMix64's output function over a
/// counter, with `key = mix(mix(seed) + epoch)`; it is brought into `0..=i` by the high half of a 128-bit product,
/// whose bias is below `2^-32` for any number of rows an epoch can have.
fn shuffle_seeded(rows: &mut [u32], seed: u64, epoch: u64) {
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    let key = mix(mix(seed).wrapping_add(epoch));
    for i in (1..rows.len()).rev() {
        let draw = mix(key.wrapping_add((i as u64).wrapping_mul(GOLDEN)));
        let j = (u128::from(draw) * (i as u128 + 1)) >> 64;
        rows.swap(i, j as usize);
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// `torch.randperm(n, generator=torch.Generator().manual_seed(seed))` for small n: Fisher-Yates from the first place up,
/// one 32-bit draw each, reduced by remainder.
fn shuffle_torch(rows: &mut [u32], seed: u64) {
    // torch keeps 64 bits of a seed and starts its 32-bit generator with the low half.
    let mut generator = Mt19937::new(seed as u32);
    for i in 0..rows.len().saturating_sub(1) {
        let left = (rows.len() - i) as u32;
        rows.swap(i, i + (generator.next() % left) as usize);
    }
}

/// The Mersenne Twister of Matsumoto and Nishimura (1998), 32-bit, period 2^19937 - 1.
struct Mt19937 {
    state: [u32; Self::N],
    index: usize,
}

impl Mt19937 {
    const N: usize = 624;
    const M: usize = 397;

    fn new(seed: u32) -> Self {
        let mut state = [seed; Self::N];
        for i in 1..Self::N {
            let last = state[i - 1];
            state[i] = 1_812_433_253u32.wrapping_mul(last ^ (last >> 30)).wrapping_add(i as u32);
        }
        Self { state, index: Self::N }
    }

    fn next(&mut self) -> u32 {
        if self.index == Self::N {
            self.twist();
        }
        let mut y = self.state[self.index];
        self.index += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    fn twist(&mut self) {
        for i in 0..Self::N {
            let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % Self::N] & 0x7fff_ffff);
            let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + Self::M) % Self::N] ^ (y >> 1) ^ odd;
        }
        self.index = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn torchtune_order_is_the_recorded_one() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/golden/shuffle-order.json");
        let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let order = Order::new(golden["n"].as_u64().unwrap() as usize, true, 42, true).unwrap();
        let mut compared = 0;
        for epoch in 0..2 {
            let rows = order.epoch(epoch);
            for (world, rank) in [(1, 0), (2, 0), (2, 1)] {
                let golden = golden[format!("world{world}_rank{rank}_epoch{epoch}")].as_array().unwrap();
                let mine: Vec<u64> = rows.iter().skip(rank).step_by(world).map(|&row| row.into()).collect();
                for (mine, golden) in mine.iter().zip(golden) {
                    assert_eq!(Some(*mine), golden.as_u64());
                    compared += 1;
                }
            }
        }
        assert_eq!(compared, 6 * 64);
    }

    /// Pins the algorithm: another order would silently change every run's numbers and break resuming.
    #[test]
    fn seeded_order_never_changes() {
        let order = |seed, epoch| Order::new(10, true, seed, false).unwrap().epoch(epoch);
        assert_eq!(order(0, 0), [3, 8, 7, 5, 4, 0, 9, 1, 6, 2]);
        assert_eq!(order(42, 1), [1, 5, 8, 6, 2, 3, 7, 9, 4, 0]);
    }

    #[test]
    fn every_order_is_a_permutation_and_depends_on_its_key() {
        for (shuffle, compat) in [(false, false), (false, true), (true, false), (true, true)] {
            for num_rows in [0, 1, 2, 1000] {
                let mut rows = Order::new(num_rows, shuffle, 7, compat).unwrap().epoch(3);
                rows.sort_unstable();
                assert_eq!(rows, (0..num_rows as u32).collect::<Vec<_>>(), "{shuffle} {compat}");
            }
        }
        let order = |seed, epoch| Order::new(1000, true, seed, false).unwrap().epoch(epoch);
        assert_ne!(order(7, 0), order(7, 1));
        assert_ne!(order(7, 0), order(8, 0));
        // Neither is the next epoch of one seed the same epoch of the next seed.
        assert_ne!(order(7, 1), order(8, 0));
        assert_eq!(order(7, 1), order(7, 1));
    }

    /// Each row is about as likely in each place: 5 rows, 20,000 epochs, so 4,000 expected and 57 one standard deviation.
    #[test]
    fn seeded_order_is_fair() {
        let order = Order::new(5, true, 1, false).unwrap();
        let mut counts = [[0u32; 5]; 5];
        for epoch in 0..20_000 {
            for (place, row) in order.epoch(epoch).into_iter().enumerate() {
                counts[place][row as usize] += 1;
            }
        }
        assert!(counts.iter().flatten().all(|count| (3_750..4_250).contains(count)), "{counts:?}");
    }

    #[test]
    fn too_many_rows_are_refused() {
        assert!(Order::new(214_748_364, true, 0, false).is_ok());
        let error = Order::new(214_748_364, true, 0, true).unwrap_err().to_string();
        assert!(error.contains("at most 214748363") && error.contains("compat: torchtune"), "{error}");
    }
}
