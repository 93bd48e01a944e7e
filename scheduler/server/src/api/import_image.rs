//! ImportImage: the files go to the image store as they come, on a thread of their own.

use std::path::Path;
use std::sync::Arc;

use shoal_proto::cluster::import_image_request::Part;
use shoal_proto::cluster::{Image, ImportImageRequest};
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use super::errors;
use crate::events::{Kind, NewEvent};
use crate::images::{Import, ImportError};
use crate::scheduler::Shared;
use crate::store::Write;
use crate::view;

/// Parts between the network and the disk.
const DEPTH: usize = 4;

pub async fn call(scheduler: &Shared, mut parts: Streaming<ImportImageRequest>) -> Result<Image, Status> {
    let (sender, receiver) = mpsc::channel(DEPTH);
    let directory = scheduler.images.directory().to_owned();
    let writer = tokio::task::spawn_blocking(move || receive(&directory, receiver));
    while let Some(message) = parts.message().await? {
        let part = message
            .part
            .ok_or_else(|| Status::invalid_argument("part: is missing in a message"))?;
        // The writer has ended early: it says why below.
        if sender.send(part).await.is_err() {
            break;
        }
    }
    drop(sender);
    let import = writer
        .await
        .map_err(super::ended)?
        .map_err(|error| errors::import(&error))?;
    match &scheduler.vmm_binary {
        Some(vmm) => import.check(vmm).await.map_err(|error| errors::import(&error))?,
        None => {
            tracing::warn!("no VMM binary is configured: an image is imported without a look at its kernel");
        }
    }
    let kept = tokio::task::spawn_blocking(move || import.keep());
    let record = Arc::new(
        kept.await
            .map_err(super::ended)?
            .map_err(|error| errors::import(&error))?,
    );
    scheduler
        .store
        .apply(vec![Write::PutImage(Arc::clone(&record))])
        .await
        .map_err(|error| errors::store(&error))?;
    scheduler.images.insert(Arc::clone(&record));
    let message = format!(
        "imported image {} ({})",
        record.name,
        record.digest.get(..12).unwrap_or_default()
    );
    scheduler
        .events
        .publish(NewEvent::new(Kind::ImageImported, message));
    Ok(view::image(&record))
}

fn receive(directory: &Path, mut parts: mpsc::Receiver<Part>) -> Result<Import, ImportError> {
    let Some(Part::Manifest(manifest)) = parts.blocking_recv() else {
        return Err(ImportError::Order("the manifest has to come first"));
    };
    let mut import = Import::begin(directory, &manifest.toml, &manifest.name)?;
    while let Some(part) = parts.blocking_recv() {
        match part {
            Part::Manifest(_) => return Err(ImportError::Order("a second manifest")),
            Part::File(file) => import.start_file(&file.name, file.size_bytes)?,
            Part::Data(data) => import.data(&data)?,
        }
    }
    import.finish_files()?;
    Ok(import)
}
