//! Whole tables.

use crate::names::Feature;
use crate::registers::{FEATURE_REGISTERS, FeatureRegister};

/// Most entries of a table (KVM_MAX_CPUID_ENTRIES).
pub const MAX_ENTRIES: usize = 256;
/// `struct kvm_cpuid_entry2`, little-endian, its padding included.
const ENTRY_BYTES: usize = 40;
const LEAF_PERFMON: u32 = 0xa;
const LEAF_XSAVE: u32 = 0xd;
const LEAF_PT: u32 = 0x14;
const LEAF_TILE: u32 = 0x1d;
const LEAF_TMUL: u32 = 0x1e;
const LEAF_AVX10: u32 = 0x24;
const LEAF_BRAND: u32 = 0x8000_0002;
const LEAF_ADDRESS: u32 = 0x8000_0008;
const ADDRESS_BITS: u32 = 0xff;
/// Legacy region and header of an XSAVE area (Intel SDM volume 1, 13.4).
const XSAVE_LEAST_BYTES: u32 = 576;
const INTEL_PT: u32 = 1 << 25;
const AMX_TILE: u32 = 1 << 24;

/// One leaf, or subleaf.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the CPUID instruction's own names")]
pub struct Entry {
    pub function: u32,
    pub index: u32,
    /// KVM_CPUID_FLAG_*.
    pub flags: u32,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// Bytes that are no table.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0} bytes are not a CPUID table: 40 for each of at most {MAX_ENTRIES} entries")]
pub struct TableError(pub usize);

/// A CPUID table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Table(Vec<Entry>);

impl From<Vec<Entry>> for Table {
    fn from(entries: Vec<Entry>) -> Self {
        Self(entries)
    }
}

impl Table {
    /// From KVM's structures, one after another.
    ///
    /// # Errors
    /// When there are too many, or there is a part of one.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, TableError> {
        let (entries, rest) = bytes.as_chunks::<ENTRY_BYTES>();
        if !rest.is_empty() || entries.len() > MAX_ENTRIES {
            return Err(TableError(bytes.len()));
        }
        let entry = |bytes: &[u8; ENTRY_BYTES]| {
            let word =
                |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
            Entry {
                function: word(0),
                index: word(4),
                flags: word(8),
                eax: word(12),
                ebx: word(16),
                ecx: word(20),
                edx: word(24),
            }
        };
        Ok(Self(entries.iter().map(entry).collect()))
    }

    /// As KVM's structures.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.0.len() * ENTRY_BYTES);
        for entry in &self.0 {
            let words = [
                entry.function,
                entry.index,
                entry.flags,
                entry.eax,
                entry.ebx,
                entry.ecx,
                entry.edx,
                0,
                0,
                0,
            ];
            words
                .iter()
                .for_each(|word| bytes.extend_from_slice(&word.to_le_bytes()));
        }
        bytes
    }

    /// Its entries.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.0
    }

    /// Whether it says nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn get(&self, function: u32, index: u32) -> Entry {
        let found = self
            .0
            .iter()
            .find(|entry| entry.function == function && entry.index == index);
        found.copied().unwrap_or_default()
    }

    fn register(&self, place: &FeatureRegister) -> u32 {
        place.register.of(&self.get(place.leaf, place.index)) & !place.not_features
    }

    /// The vendor, such as "GenuineIntel".
    #[must_use]
    pub fn vendor(&self) -> String {
        let leaf = self.get(0, 0);
        printable(&[leaf.ebx, leaf.edx, leaf.ecx])
    }

    /// The model's name, or where KVM gives none its vendor, family, model and stepping.
    #[must_use]
    pub fn model(&self) -> String {
        let leaf = |i| self.get(LEAF_BRAND + i, 0);
        let words = [0, 1, 2].map(|i| [leaf(i).eax, leaf(i).ebx, leaf(i).ecx, leaf(i).edx]);
        let name = printable(words.as_flattened());
        if !name.is_empty() {
            return name.split_whitespace().collect::<Vec<_>>().join(" ");
        }
        // Intel SDM volume 2A, CPUID, figure 3-6; AMD the same.
        let signature = self.get(1, 0).eax;
        let family = (signature >> 8 & 0xf) + (signature >> 20 & 0xff);
        let model = (signature >> 4 & 0xf) + (signature >> 12 & 0xf0);
        format!(
            "{} family {family} model {model} stepping {}",
            self.vendor(),
            signature & 0xf
        )
    }

    /// The leaf of performance counters.
    pub(crate) fn perfmon(&self) -> Entry {
        self.get(LEAF_PERFMON, 0)
    }

    /// Physical address bits.
    #[must_use]
    pub fn address_bits(&self) -> u32 {
        self.get(LEAF_ADDRESS, 0).eax & ADDRESS_BITS
    }

    /// Bytes of an XSAVE area with all components the table has.
    #[must_use]
    pub fn xsave_bytes(&self) -> u32 {
        self.get(LEAF_XSAVE, 0).ecx
    }

    /// Components of an XSAVE area beside the legacy ones: number, bytes, offset.
    pub fn xsave_components(&self) -> impl Iterator<Item = (u32, u32, u32)> {
        let leaf = self.get(LEAF_XSAVE, 0);
        let user = u64::from(leaf.edx) << 32 | u64::from(leaf.eax);
        (2..63)
            .filter(move |bit| user >> bit & 1 == 1)
            .map(|bit| (bit, self.get(LEAF_XSAVE, bit)))
            .map(|(bit, entry)| (bit, entry.eax, entry.ebx))
    }

    /// Its features in a fixed order.
    pub fn features(&self) -> impl Iterator<Item = Feature> {
        FEATURE_REGISTERS
            .iter()
            .flat_map(|place| bits(place, self.register(place)))
    }

    /// Features that it has and the other has not.
    pub fn features_without<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = Feature> + 'a {
        FEATURE_REGISTERS
            .iter()
            .flat_map(|place| bits(place, self.register(place) & !other.register(place)))
    }

    /// What a VM with this table misses on a host with that one, in words; empty if it can run there.
    #[must_use]
    pub fn missing_on(&self, host: &Self) -> Vec<String> {
        let mut missing = vec![];
        if self.vendor() != host.vendor() {
            missing.push(format!("vendor {} (it is {})", self.vendor(), host.vendor()));
        }
        if self.address_bits() > host.address_bits() {
            missing.push(format!("{} physical address bits", self.address_bits()));
        }
        missing.extend(self.features_without(host).map(|feature| feature.to_string()));
        missing
    }

    /// Only what tells features, so that equal CPUs give equal tables: for a baseline, and to compare.
    #[must_use]
    pub fn features_only(&self) -> Self {
        let mut places: Vec<(u32, u32)> = FEATURE_REGISTERS
            .iter()
            .map(|place| (place.leaf, place.index))
            .chain([(0, 0), (LEAF_PERFMON, 0), (LEAF_ADDRESS, 0), (LEAF_AVX10, 0)])
            .collect();
        places.sort_unstable();
        places.dedup();
        let mut entries = vec![];
        for (function, index) in places {
            let own = self.get(function, index);
            let mut kept = Entry {
                function,
                index,
                flags: own.flags,
                ..Entry::default()
            };
            match function {
                0 => (kept.ebx, kept.ecx, kept.edx) = (own.ebx, own.ecx, own.edx),
                LEAF_PERFMON | LEAF_AVX10 => {
                    (kept.eax, kept.ebx, kept.ecx, kept.edx) = (own.eax, own.ebx, own.ecx, own.edx);
                }
                LEAF_ADDRESS => kept.eax = own.eax & ADDRESS_BITS,
                _ => {}
            }
            let of_leaf = |place: &&FeatureRegister| place.leaf == function && place.index == index;
            for place in FEATURE_REGISTERS.iter().filter(of_leaf) {
                *place.register.of_mut(&mut kept) = self.register(place);
            }
            if (kept.eax, kept.ebx, kept.ecx, kept.edx) != (0, 0, 0, 0) {
                entries.push(kept);
            }
        }
        Self(entries)
    }

    /// This table with no features but those that the other has, too. All else stays; what goes with a feature that
    /// goes (sizes, subleaves, counters) goes as well.
    #[must_use]
    pub fn restricted_to(&self, other: &Self) -> Self {
        let mut table = self.clone();
        for entry in &mut table.0 {
            let (function, index) = (entry.function, entry.index);
            let of_leaf = |place: &&FeatureRegister| place.leaf == function && place.index == index;
            for place in FEATURE_REGISTERS.iter().filter(of_leaf) {
                *place.register.of_mut(entry) &= other.register(place) | place.not_features;
            }
            let there = other.get(entry.function, entry.index);
            match entry.function {
                LEAF_ADDRESS => {
                    let bits = (entry.eax & ADDRESS_BITS).min(there.eax & ADDRESS_BITS);
                    entry.eax = entry.eax & !ADDRESS_BITS | bits;
                }
                // Numbers of counters: the same or none.
                LEAF_PERFMON if registers(entry) != registers(&there) => clear(entry),
                // Version and vector lengths: the same or none.
                LEAF_AVX10 if registers(entry) != registers(&there) => clear(entry),
                _ => {}
            }
        }
        table.drop_dependants();
        table
    }

    fn drop_dependants(&mut self) {
        let leaf = self.get(7, 0);
        let (pt, amx) = (leaf.ebx & INTEL_PT != 0, leaf.edx & AMX_TILE != 0);
        let (components, supervisor) = (self.get(LEAF_XSAVE, 0), self.get(LEAF_XSAVE, 1));
        let in_use = |bit: u32| {
            let word = if bit < 32 {
                components.eax | supervisor.ecx
            } else {
                components.edx | supervisor.edx
            };
            word >> (bit % 32) & 1 == 1
        };
        self.0.retain(|entry| match entry.function {
            LEAF_PT => pt,
            LEAF_TILE | LEAF_TMUL => amx,
            LEAF_XSAVE => entry.index < 2 || (entry.index < 63 && in_use(entry.index)),
            _ => true,
        });
        let ends = self
            .xsave_components()
            .map(|(_, bytes, offset)| offset.saturating_add(bytes));
        let bytes = ends.fold(XSAVE_LEAST_BYTES, u32::max);
        for entry in &mut self.0 {
            if (entry.function, entry.index) == (LEAF_XSAVE, 0) && entry.ecx > bytes {
                (entry.ebx, entry.ecx) = (entry.ebx.min(bytes), bytes);
            }
        }
    }
}

fn registers(entry: &Entry) -> [u32; 4] {
    [entry.eax, entry.ebx, entry.ecx, entry.edx]
}

fn clear(entry: &mut Entry) {
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
}

fn bits(place: &FeatureRegister, word: u32) -> impl Iterator<Item = Feature> + use<> {
    let (leaf, index, register) = (place.leaf, place.index, place.register);
    (0..32)
        .filter(move |bit| word >> bit & 1 == 1)
        .map(move |bit| Feature {
            leaf,
            index,
            register,
            bit,
        })
}

fn printable(words: &[u32]) -> String {
    let bytes = words.iter().flat_map(|word| word.to_le_bytes());
    bytes
        .filter(|byte| byte.is_ascii_graphic() || *byte == b' ')
        .map(char::from)
        .collect::<String>()
        .trim()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> Entry {
        Entry {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Entry::default()
        }
    }

    fn intel() -> Vec<Entry> {
        vec![
            leaf(0, 0, [0x16, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
            leaf(1, 0, [0x906e9, 0x0101_0800, 1 << 31 | 1 << 28 | 1, 1 << 26]),
            leaf(7, 0, [0, 1 << 16 | 1 << 5, 1 << 3, 0]),
            leaf(0xd, 0, [0x2e7, 2696, 2696, 0]),
            leaf(0xd, 2, [256, 576, 0, 0]),
            leaf(0xd, 5, [64, 1088, 0, 0]),
            leaf(0xd, 6, [512, 1152, 0, 0]),
            leaf(0xd, 7, [1024, 1664, 0, 0]),
            leaf(0xd, 9, [8, 2688, 0, 0]),
            leaf(LEAF_ADDRESS, 0, [0x3030, 0, 0x1000, 0]),
        ]
    }

    fn names(table: &Table) -> Vec<String> {
        table.features().map(|feature| feature.to_string()).collect()
    }

    #[test]
    fn features_are_listed_by_name_and_own_bits_are_not() {
        let names = names(&Table(intel()));
        assert!(names.contains(&"AVX512F".to_owned()) && names.contains(&"SSE3".to_owned()));
        assert!(!names.contains(&"HYPERVISOR".to_owned()));
        assert_eq!(Table(intel()).vendor(), "GenuineIntel");
    }

    #[test]
    fn what_a_host_lacks_is_named() {
        let mut small = intel();
        small[2].ebx = 1 << 5;
        small[0].ebx = 0x6874_7541;
        small[9].eax = 39;
        let missing = Table(intel()).missing_on(&Table(small.clone()));
        assert_eq!(
            missing,
            [
                "vendor GenuineIntel (it is AuthineIntel)",
                "48 physical address bits",
                "AVX512F"
            ]
        );
        assert!(Table(intel()).missing_on(&Table(intel())).is_empty());
        small[0].ebx = intel()[0].ebx;
        assert!(Table(small).missing_on(&Table(intel())).is_empty());
    }

    #[test]
    fn a_restricted_table_keeps_its_own_and_loses_what_goes_with_a_feature() {
        let mut baseline = intel();
        baseline[2] = leaf(7, 0, [0, 1 << 5, 0, 0]);
        baseline[3].eax = 7;
        baseline[9].eax = 39;
        let restricted = Table(intel()).restricted_to(&Table(baseline).features_only());
        assert_eq!(restricted.get(1, 0), intel()[1], "nothing is taken from leaf 1");
        assert_eq!(restricted.get(7, 0).ebx, 1 << 5);
        assert_eq!(
            restricted.get(LEAF_ADDRESS, 0),
            leaf(LEAF_ADDRESS, 0, [0x3027, 0, 0x1000, 0])
        );
        assert_eq!(restricted.xsave_components().collect::<Vec<_>>(), [(2, 256, 576)]);
        assert_eq!(restricted.xsave_bytes(), 832);
        assert_eq!(restricted.entries().len(), intel().len() - 4);
    }

    #[test]
    fn only_whole_and_not_too_many_entries_are_a_table() {
        let table = Table(intel());
        let mut bytes = table.to_bytes();
        assert_eq!(Table::from_bytes(&bytes), Ok(table));
        bytes.pop();
        assert_eq!(Table::from_bytes(&bytes), Err(TableError(399)));
        assert!(Table::from_bytes(&vec![0; ENTRY_BYTES * (MAX_ENTRIES + 1)]).is_err());
    }

    #[test]
    fn equal_features_make_equal_tables() {
        let mut other = intel();
        other[1].ebx = 0x0302_0800;
        other[1].ecx &= !(1 << 31);
        other.reverse();
        assert_eq!(Table(intel()).features_only(), Table(other).features_only());
    }

    fn table() -> impl Strategy<Value = Table> {
        let places: Vec<(u32, u32)> = FEATURE_REGISTERS
            .iter()
            .map(|place| (place.leaf, place.index))
            .chain([(0xa, 0), (0x24, 0), (0xd, 2), (0xd, 9), (4, 1)])
            .collect();
        let words = proptest::array::uniform4(any::<u32>());
        proptest::collection::btree_map(proptest::sample::select(places), words, 0..20).prop_map(|leaves| {
            Table(
                leaves
                    .into_iter()
                    .map(|((f, i), words)| leaf(f, i, words))
                    .collect(),
            )
        })
    }

    proptest! {
        #[test]
        fn a_restricted_table_runs_on_both(a in table(), b in table()) {
            let common = a.restricted_to(&b);
            prop_assert!(common.missing_on(&a).is_empty());
            prop_assert!(common.missing_on(&b).is_empty());
            prop_assert_eq!(common.restricted_to(&b), common.clone());
            // Nothing is lost that both have.
            let both = a.features().filter(|feature| b.features().any(|other| other == *feature));
            let lost = both.filter(|feature| !common.features().any(|kept| kept == *feature));
            prop_assert!(lost.into_iter().all(|feature| matches!(feature.leaf, LEAF_PT | LEAF_TMUL)));
        }

        #[test]
        fn a_baseline_does_not_depend_on_the_order(a in table(), b in table(), c in table()) {
            let of = |tables: [&Table; 3]| {
                let [first, rest @ ..] = tables;
                let common = rest.iter().fold(first.features_only(), |common, table| common.restricted_to(table));
                names(&common)
            };
            let without_dependants = |names: Vec<String>| {
                names.into_iter().filter(|name| !name.starts_with("leaf 1")).collect::<Vec<_>>()
            };
            prop_assert_eq!(without_dependants(of([&a, &b, &c])), without_dependants(of([&c, &a, &b])));
        }

        #[test]
        fn any_bytes_are_a_table_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            if let Ok(table) = Table::from_bytes(&bytes) {
                let _ = (names(&table), table.model(), table.restricted_to(&table), table.features_only());
            }
        }
    }
}
