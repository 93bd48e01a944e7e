//! Who has a connection, and who has to give it up for another.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::Limits;

/// Tells a connection that it has to end, by whatever it yields.
pub type End = oneshot::Receiver<()>;

/// Connections by address.
#[derive(Debug, Default)]
pub struct Seats(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    /// Of the next connection.
    number: u64,
    all: usize,
    of: HashMap<IpAddr, OfOne>,
    /// Those that have not made a call. The lowest number is the oldest.
    unproved: BTreeMap<u64, Unproved>,
}

#[derive(Debug, Default)]
struct OfOne {
    all: usize,
    unproved: BTreeSet<u64>,
}

/// Ends the connection when it is dropped.
#[derive(Debug)]
struct Unproved {
    address: IpAddr,
    _end: oneshot::Sender<()>,
}

/// Why there is no room: of all that could be closed, each has made calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Full {
    OfOne(usize),
    OfAll(usize),
}

impl std::fmt::Display for Full {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::OfOne(most) => write!(out, "the address has {most}, and calls were made on all of them"),
            Self::OfAll(most) => write!(
                out,
                "there are {most}, and calls were made on all of them; more open files (RLIMIT_NOFILE) allow for more"
            ),
        }
    }
}

/// A seat that was given.
#[derive(Debug)]
pub struct Taken {
    pub seat: Seat,
    pub end: End,
    /// Whose connection was closed for it.
    pub instead_of: Option<IpAddr>,
}

impl Seats {
    /// Gives a seat to a connection from this address. If it or all have their number, the oldest of those connections that
    /// have made no call is closed.
    pub fn take(seats: &Arc<Self>, address: IpAddr, limits: &Limits) -> Result<Taken, Full> {
        let address = network(address);
        // Outlives the lock: its end wakes a task, of which nothing is known here.
        let instead_of;
        let mut table = seats.lock();
        instead_of = table.make_room(address, limits)?;
        let number = table.number;
        table.number += 1;
        table.all += 1;
        let (tell, end) = oneshot::channel();
        table.unproved.insert(number, Unproved { address, _end: tell });
        let of_one = table.of.entry(address).or_default();
        of_one.all += 1;
        of_one.unproved.insert(number);
        Ok(Taken {
            seat: Seat {
                seats: Arc::clone(seats),
                address,
                number,
                proved: false,
            },
            end,
            instead_of: instead_of.as_ref().map(|closed| closed.address),
        })
    }

    // Nothing that is done under the lock panics.
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn make_room(&mut self, address: IpAddr, limits: &Limits) -> Result<Option<Unproved>, Full> {
        let of_one = self.of.get(&address);
        let oldest = if of_one.is_some_and(|of_one| of_one.all >= limits.of_one) {
            let oldest = of_one.and_then(|of_one| of_one.unproved.first());
            *oldest.ok_or(Full::OfOne(limits.of_one))?
        } else if self.all >= limits.of_all {
            let oldest = self.unproved.first_key_value();
            *oldest.ok_or(Full::OfAll(limits.of_all))?.0
        } else {
            return Ok(None);
        };
        let closed = self.take_out(oldest);
        if let Some(Unproved { address, .. }) = &closed {
            self.leave(*address);
        }
        Ok(closed)
    }

    /// Takes one out of those that can be closed, if it is one.
    fn take_out(&mut self, number: u64) -> Option<Unproved> {
        let unproved = self.unproved.remove(&number)?;
        if let Some(of_one) = self.of.get_mut(&unproved.address) {
            of_one.unproved.remove(&number);
        }
        Some(unproved)
    }

    fn leave(&mut self, address: IpAddr) {
        self.all -= 1;
        if let Some(of_one) = self.of.get_mut(&address) {
            of_one.all -= 1;
            if of_one.all == 0 {
                self.of.remove(&address);
            }
        }
    }
}

/// What one who connects cannot have many of: an address, or the network that a host of IPv6 may choose its address from.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            IpAddr::from([a, b, c, d, 0, 0, 0, 0])
        }
        address @ IpAddr::V4(_) => address,
    }
}

/// A connection's place in the table. It is given back when this is dropped.
#[derive(Debug)]
pub struct Seat {
    seats: Arc<Seats>,
    address: IpAddr,
    number: u64,
    proved: bool,
}

impl Seat {
    /// Keeps the seat until it is dropped. False if it was given to another already.
    pub fn keep(&mut self) -> bool {
        if !self.proved {
            let taken_out = self.seats.lock().take_out(self.number);
            self.proved = taken_out.is_some();
        }
        self.proved
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if self.keep() {
            self.seats.lock().leave(self.address);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_of_ipv6_is_one_whatever_address_it_takes() {
        let of = |text: &str| network(text.parse().expect("an address"));
        assert_eq!(of("2001:db8:1:2::3"), of("2001:db8:1:2:ffff::4"));
        assert_ne!(of("2001:db8:1:2::3"), of("2001:db8:1:3::3"));
        assert_eq!(of("::ffff:10.0.0.1"), of("10.0.0.1"));
        assert_ne!(of("10.0.0.1"), of("10.0.0.2"));
    }
}
