//! The schedulers of a cluster: this one, the others, and which of them leads.

use std::net::SocketAddr;

use shoal_proto::cluster::SchedulerInfo;

use crate::store::etcd::{Etcd, Member};
use crate::store::{Backend as _, StoreError};

/// How to find out who there is.
#[derive(Debug, Clone)]
pub enum Schedulers {
    /// The store is a file, and there is no other.
    Alone(Member),
    /// The store is etcd, which knows them all.
    Cluster {
        /// Where they are entered.
        etcd: Etcd,
        /// This one.
        own: Member,
        /// Another leads, and hears what agents report.
        follows: bool,
    },
}

impl Schedulers {
    /// The only one.
    pub fn alone(address: SocketAddr, started_unix_ms: i64) -> Self {
        Self::Alone(Member {
            id: String::new(),
            address: address.to_string(),
            started_unix_ms,
        })
    }

    /// Agents report to another.
    pub fn follows(&self) -> bool {
        matches!(self, Self::Cluster { follows: true, .. })
    }

    /// There may be others.
    pub fn are_several(&self) -> bool {
        matches!(self, Self::Cluster { .. })
    }

    /// Where the store is, for people.
    pub fn store(&self) -> String {
        match self {
            Self::Alone(_) => "file".to_owned(),
            Self::Cluster { etcd, .. } => etcd.name().to_owned(),
        }
    }

    /// All that live, by address. `term`: of the one that is alone.
    pub async fn list(&self, term: u64) -> Result<Vec<SchedulerInfo>, StoreError> {
        let (etcd, own) = match self {
            Self::Alone(own) => {
                return Ok(vec![SchedulerInfo {
                    address: own.address.clone(),
                    leads: true,
                    term,
                    started_unix_ms: own.started_unix_ms,
                    leads_since_unix_ms: own.started_unix_ms,
                    answers: true,
                }]);
            }
            Self::Cluster { etcd, own, .. } => (etcd, own),
        };
        let leader = etcd.leader().await?;
        let mut members = etcd.members().await?;
        members.sort_by(|a, b| a.address.cmp(&b.address));
        let info = |member: Member| {
            let lead = leader.as_ref().filter(|leader| leader.member.id == member.id);
            SchedulerInfo {
                leads: lead.is_some(),
                term: lead.map_or(0, |lead| lead.term),
                leads_since_unix_ms: lead.map_or(0, |lead| lead.since_unix_ms),
                started_unix_ms: member.started_unix_ms,
                answers: member.id == own.id,
                address: member.address,
            }
        };
        Ok(members.into_iter().map(info).collect())
    }
}
