//! RunVm: everything is checked and complete before anything is placed.

use std::sync::Arc;

use shoal_plan::{DEFAULT_PRIORITY, PlaceError, Rules};
use shoal_proto::cluster::{self, RunVmRequest, Vm};
use shoal_proto::{Epoch, NodeName, VmId, VmName};
use tonic::Status;

use super::{errors, labels};
use crate::execute::launch::{self, LaunchError};
use crate::limits::{self, FieldError};
use crate::queue;
use crate::record::{ImageRecord, Outcome, Phase, Runs, VmRecord, VmWishes, now_unix_ms};
use crate::scheduler::{Scheduler, Shared};
use crate::view;
use crate::vms::VmEntry;

pub async fn call(scheduler: &Shared, request: RunVmRequest) -> Result<Vm, Status> {
    let node = |name: &str| match name {
        "" => Ok(None),
        name => super::find_node(scheduler, name).map(|node| Some(node.name())),
    };
    let (pinned, preferred) = (node(&request.node)?, node(&request.prefer_node)?);
    if pinned.is_some() && preferred.is_some() {
        return Err(Status::invalid_argument(
            "prefer_node: node is given, too, which is the only one for the VM; give one of them",
        ));
    }
    let may_wait = request.queue;
    let mut draft = draft(scheduler, request)?;
    draft.wishes.locked = pinned.is_some();
    draft.runs.preferred = preferred;
    let shared = Arc::clone(scheduler);
    if may_wait {
        let task = tokio::spawn(async move { run_or_wait(&shared, draft, pinned).await });
        return task.await.map_err(super::ended)?.map_err(errors::launch);
    }
    // On its own task: a start that has begun is brought to its end even if the caller goes away.
    let task = tokio::spawn(async move { run_now(&shared, draft, pinned).await });
    let entry = task.await.map_err(super::ended)?.map_err(errors::launch)?;
    Ok(view::vm(scheduler, &entry))
}

/// Starts the VM at once, or as soon as those have ended that give way to it.
pub(super) async fn run_now(
    scheduler: &Shared,
    draft: VmRecord,
    pinned: Option<NodeName>,
) -> Result<Arc<VmEntry>, LaunchError> {
    let refused = match launch::submit_and_start(scheduler, draft.clone(), pinned.as_ref()).await {
        Ok(entry) => return Ok(entry),
        Err(error @ LaunchError::Place(PlaceError::NothingFits { .. })) => error,
        Err(error) => return Err(error),
    };
    let Some(waiting) = queue::enqueue_with_room(scheduler, &draft, pinned.as_ref()).await? else {
        return Err(refused);
    };
    let mut record = waiting.entry.subscribe();
    let begun = |record: &Arc<VmRecord>| !matches!(record.phase, Phase::Queued | Phase::Starting);
    // The entry in hand keeps the channel open.
    let record = record.wait_for(begun).await.map(|record| Arc::clone(&record));
    match record.map(|record| record.phase.clone()) {
        Ok(Phase::Ended(Outcome::Failed { reason })) => Err(LaunchError::NotStarted {
            vm: draft.name,
            reason,
        }),
        _ => Ok(waiting.entry),
    }
}

/// Starts the VM, or has it wait if it fits nowhere or others wait already.
async fn run_or_wait(
    scheduler: &Shared,
    draft: VmRecord,
    pinned: Option<NodeName>,
) -> Result<Vm, LaunchError> {
    if scheduler.queue.is_empty() {
        match launch::submit_and_start(scheduler, draft.clone(), pinned.as_ref()).await {
            Ok(entry) => return Ok(view::vm(scheduler, &entry)),
            Err(LaunchError::Place(PlaceError::NothingFits { .. })) => {}
            Err(error) => return Err(error),
        }
    }
    let waiting = queue::enqueue(scheduler, draft, pinned).await?;
    let started = scheduler.vms.get(waiting.record.vm.id);
    Ok(started.map_or_else(|| view::queued(&waiting), |entry| view::vm(scheduler, &entry)))
}

/// The record as it will be, but for its node.
fn draft(scheduler: &Scheduler, request: RunVmRequest) -> Result<VmRecord, Status> {
    let image = scheduler.images.get(&request.image).ok_or_else(|| {
        let name = limits::shorten(&request.image);
        Status::not_found(format!(
            "image: there is no image '{name}'; `shoal image ls` lists them"
        ))
    })?;
    let name = vm_name(scheduler, &request.name, &image)?;
    let cpus = if request.cpus == 0 {
        image.cpus
    } else {
        request.cpus
    };
    limits::cpus(cpus)
        .and_then(|()| limits::at_most("cpus", cpus, image.max_cpus.unwrap_or(cpus)))
        .map_err(|error| errors::field(&error))?;
    // A size without the flag that says it is set can only be meant.
    let memory_set = request.memory_set || request.memory_bytes != 0;
    let memory_bytes = if memory_set {
        request.memory_bytes
    } else {
        image.memory_bytes
    };
    limits::memory_bytes(memory_bytes).map_err(|error| errors::field(&error))?;
    let cmdline = limits::cmdline_with_args(&image.cmdline, image.initrd.is_some(), &request.args)
        .map_err(|error| errors::field(&error))?;
    if let Some(software) = &image.software_kvm {
        limits::cmdline_with("args", &cmdline, &software.cmdline).map_err(|error| errors::field(&error))?;
    }
    let wishes = VmWishes {
        preemptible: request.preemptible,
        queued: request.queue,
        ..wishes(
            &request.labels,
            &request.rules.unwrap_or_default(),
            request.priority.unwrap_or(DEFAULT_PRIORITY),
        )?
    };
    Ok(VmRecord {
        id: VmId::new(),
        name,
        image: image.name.clone(),
        image_digest: image.digest.clone(),
        args: request.args,
        kernel: image.kernel.clone(),
        initrd: image.initrd.clone(),
        cmdline,
        software_kvm: image.software_kvm.clone(),
        cpus,
        memory_bytes,
        created_unix_ms: now_unix_ms(),
        node: placeholder_node()?,
        epoch: Epoch(1),
        last_epoch: Epoch(1),
        fenced_through: Epoch(0),
        phase: Phase::Starting,
        message: String::new(),
        cpu: None,
        cpu_baseline: false,
        kvm: None,
        wishes,
        home: None,
        placement: String::new(),
        suspended: None,
        giving_way: None,
        runs: Runs::default(),
    })
}

/// What the owner wishes, checked.
fn wishes(labels: &[String], rules: &cluster::Rules, priority: u32) -> Result<VmWishes, Status> {
    limits::priority(priority).map_err(|error| errors::field(&error))?;
    let rules = Rules {
        selector: labels::terms("selector", &rules.selector)?,
        tolerations: labels::terms("tolerations", &rules.tolerations)?,
        affinity: labels::terms("affinity", &rules.affinity)?,
        anti_affinity: labels::terms("anti_affinity", &rules.anti_affinity)?,
        exclusive: rules.exclusive,
    };
    Ok(VmWishes {
        labels: labels::all("labels", labels)?,
        rules: (!rules.is_empty()).then(|| Arc::new(rules)),
        priority,
        ..VmWishes::default()
    })
}

/// Replaced by the node chosen.
fn placeholder_node() -> Result<NodeName, Status> {
    "none".parse().map_err(|_| Status::internal("node name"))
}

/// How many random digits a made name has, one try after another.
const DIGITS: [usize; 5] = [4, 4, 4, 8, 12];

/// The name asked for, or one made from the image's that no VM has.
fn vm_name(scheduler: &Scheduler, asked: &str, image: &ImageRecord) -> Result<VmName, Status> {
    if asked.is_empty() {
        let taken = |name: &str| scheduler.vms.find(name).is_some() || scheduler.queue.find(name).is_some();
        return made_name(&image.name, taken)
            .parse()
            .map_err(|error| Status::internal(format!("no name could be made: {error}")));
    }
    given_name(asked)
}

/// A name that looks like an id would take the calls that are meant for the VM with that id.
fn given_name(asked: &str) -> Result<VmName, Status> {
    if asked.parse::<VmId>().is_ok() {
        let error = FieldError::new("name", asked, "a name: it has the form of an id; choose another");
        return Err(errors::field(&error));
    }
    asked
        .parse()
        .map_err(|error: shoal_proto::IdError| Status::invalid_argument(error.to_string()))
}

fn made_name(image: &str, taken: impl Fn(&str) -> bool) -> String {
    let base: String = image.replace(['.', '_'], "-").chars().take(48).collect();
    let mut made = String::new();
    for digits in DIGITS {
        let random = VmId::new().to_string().replace('-', "");
        let suffix = random.get(..digits).unwrap_or_default();
        made = format!("{}-{suffix}", base.trim_end_matches('-'));
        if !taken(&made) {
            break;
        }
    }
    made
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_looks_like_an_id_is_refused() {
        let id = VmId::new().to_string();
        for name in [&id, &id.replace('-', "")] {
            let refused = given_name(name).expect_err("an id");
            assert_eq!(refused.code(), tonic::Code::InvalidArgument);
            assert!(refused.message().starts_with("name: "), "{refused}");
            assert!(refused.message().contains("has the form of an id"), "{refused}");
        }
        // Not the number of digits of one.
        for name in ["deadbeef", &id[..35], &id[..8]] {
            assert_eq!(
                given_name(name.trim_end_matches('-')).expect("a name").as_str(),
                name
            );
        }
    }

    #[test]
    fn a_made_name_is_one_that_no_vm_has() {
        let short = made_name("my_image.v2", |_| false);
        assert!(
            short.starts_with("my-image-v2-") && short.len() == "my-image-v2-".len() + 4,
            "{short}"
        );
        let long = made_name("x", |name| name.len() < "x-".len() + 8);
        assert_eq!(long.len(), "x-".len() + 8, "{long}");
        assert!(made_name(&"x".repeat(70), |_| true).parse::<VmName>().is_ok());
    }
}
