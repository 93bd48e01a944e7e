//! A source that speaks version 1: everything over the control connection.

use std::time::Instant;

use super::{Destination, DestinationError};
use crate::migration::pages::{self, PageCounts};
use crate::migration::transport::Transport;
use crate::migration::wire::{self, Connection, FrameKind, Pass};
use crate::vm::{Vm, VmHooks};

pub(super) fn phases(
    destination: &mut Destination<'_>,
    control: &mut Connection<Transport>,
    hooks: VmHooks,
) -> Result<Vm, DestinationError> {
    let vm = destination.negotiate(control, hooks)?;
    let (saved, last_running) = pre_copy_and_final_pages(control, &vm)?;
    destination.state(control, &vm, &saved, last_running, None)?;
    destination.commit(control, vm)
}

/// Writes pages as they come, pass after pass, until the state comes. The final pass looks like every other. Gives the
/// state, and a moment at which the guest still ran at the source.
fn pre_copy_and_final_pages(
    control: &mut Connection<Transport>,
    vm: &Vm,
) -> Result<(Vec<u8>, Instant), DestinationError> {
    let mut counts = PageCounts::default();
    let mut last_running = Instant::now();
    loop {
        let mut header = control.receive_header()?;
        match header.kind {
            FrameKind::Pages => pages::v1::receive(control, &mut header, vm.memory(), &mut counts)?,
            FrameKind::PassEnd => {
                let pass: Pass = wire::decode(header.kind, &control.receive_payload(&mut header)?)?;
                if pass.pages != counts.raw {
                    return Err(DestinationError::PagesLost {
                        pass: pass.pass,
                        sent: pass.pages,
                        received: counts.raw,
                    });
                }
                // The source pauses the guest after an acknowledgement, never before it.
                last_running = Instant::now();
                control.send(FrameKind::PassAck, &pass)?;
            }
            FrameKind::State => return Ok((control.receive_payload(&mut header)?, last_running)),
            FrameKind::Abort => return Err(wire::aborted(&control.receive_payload(&mut header)?).into()),
            other => return Err(DestinationError::OutOfPlace(other)),
        }
    }
}
