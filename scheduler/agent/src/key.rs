//! Which VMM: a VM at an epoch.

use std::fmt;
use std::str::FromStr;

use shoal_proto::{Epoch, IdError, VmId, node};

/// One incarnation of one VM. Names its runtime directory: `VM_ID-EPOCH`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct VmKey {
    pub(crate) id: VmId,
    pub(crate) epoch: Epoch,
}

impl VmKey {
    /// From the two fields of a message.
    pub(crate) fn parse(vm_id: &str, epoch: u64) -> Result<Self, IdError> {
        Ok(Self {
            id: vm_id.parse()?,
            epoch: Epoch::from_wire(epoch)?,
        })
    }

    /// As a field of a message.
    pub(crate) fn to_ref(self) -> node::VmRef {
        node::VmRef {
            vm_id: self.id.to_string(),
            epoch: self.epoch.0,
        }
    }
}

impl fmt::Display for VmKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.id, self.epoch)
    }
}

/// A name that is no [`VmKey`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NotAKey;

impl FromStr for VmKey {
    type Err = NotAKey;
    fn from_str(name: &str) -> Result<Self, NotAKey> {
        let (id, epoch) = name.rsplit_once('-').ok_or(NotAKey)?;
        let epoch = epoch.parse().map_err(|_| NotAKey)?;
        let key = Self::parse(id, epoch).map_err(|_| NotAKey)?;
        // Only the spelling that Display writes, so that a key has exactly one directory.
        if key.to_string() == name {
            Ok(key)
        } else {
            Err(NotAKey)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_name_directories_both_ways() {
        let key = VmKey {
            id: VmId::new(),
            epoch: Epoch(7),
        };
        assert_eq!(key.to_string().parse(), Ok(key));
        let id = key.id;
        for bad in [
            format!("{id}"),
            format!("{id}-"),
            format!("{id}-07"),
            format!("{id}-x"),
            "../x-1".into(),
        ] {
            assert_eq!(bad.parse::<VmKey>(), Err(NotAKey), "{bad}");
        }
    }
}
