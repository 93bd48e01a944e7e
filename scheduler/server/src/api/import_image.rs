//! ImportImage: the files go to the image store as they come. Only what has come is given to a blocking thread, which
//! writes it and is free again: none waits for a client.

use std::sync::Arc;
use std::time::Duration;

use shoal_proto::cluster::import_image_request::Part;
use shoal_proto::cluster::{Image, ImportImageRequest};
use tokio_stream::{Stream, StreamExt as _};
use tonic::Status;

use super::errors;
use crate::events::{Kind, NewEvent};
use crate::images::{Import, ImportError};
use crate::scheduler::Shared;
use crate::store::Write;
use crate::view;

/// Imports at a time.
pub const MOST: usize = 4;
/// How long a client may send nothing.
const IDLE: Duration = Duration::from_secs(30);

pub async fn call(
    scheduler: &Shared,
    parts: impl Stream<Item = Result<ImportImageRequest, Status>> + Unpin,
) -> Result<Image, Status> {
    let _turn = scheduler.imports.try_acquire().map_err(|_| {
        Status::resource_exhausted(format!(
            "{MOST} images are being imported, which is the most at a time; try again when one is done"
        ))
    })?;
    let import = receive(scheduler, parts).await?;
    match &scheduler.vmm_binary {
        Some(vmm) => import.check(vmm).await.map_err(|error| errors::import(&error))?,
        None => {
            tracing::warn!("no VMM binary is configured: an image is imported without a look at its kernel");
        }
    }
    let record = Arc::new(on_disk(move || import.keep()).await?);
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

async fn receive(
    scheduler: &Shared,
    mut parts: impl Stream<Item = Result<ImportImageRequest, Status>> + Unpin,
) -> Result<Import, Status> {
    let Some(Part::Manifest(manifest)) = next(&mut parts).await? else {
        return Err(errors::import(&ImportError::Order(
            "the manifest has to come first",
        )));
    };
    let directory = scheduler.images.directory();
    let begun = Import::begin(directory, &manifest.toml, &manifest.name);
    let mut import = begun.map_err(|error| errors::import(&error))?;
    while let Some(part) = next(&mut parts).await? {
        import = on_disk(move || take(import, part)).await?;
    }
    on_disk(move || import.finish_files().map(|()| import)).await
}

async fn next(
    parts: &mut (impl Stream<Item = Result<ImportImageRequest, Status>> + Unpin),
) -> Result<Option<Part>, Status> {
    let message = tokio::time::timeout(IDLE, parts.next()).await.map_err(|_| {
        Status::deadline_exceeded(format!("import stream: nothing came for {} s", IDLE.as_secs()))
    })?;
    let Some(message) = message.transpose()? else {
        return Ok(None);
    };
    let part = message.part;
    part.map(Some)
        .ok_or_else(|| Status::invalid_argument("part: is missing in a message"))
}

fn take(mut import: Import, part: Part) -> Result<Import, ImportError> {
    match part {
        Part::Manifest(_) => return Err(ImportError::Order("a second manifest")),
        Part::File(file) => import.start_file(&file.name, file.size_bytes)?,
        Part::Data(data) => import.data(&data)?,
    }
    Ok(import)
}

/// One step that reads or writes files.
async fn on_disk<T: Send + 'static>(
    step: impl FnOnce() -> Result<T, ImportError> + Send + 'static,
) -> Result<T, Status> {
    let done = tokio::task::spawn_blocking(step).await.map_err(super::ended)?;
    done.map_err(|error| errors::import(&error))
}
