//! `shoal image import PATH` and `shoal image ls`

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use shoal_proto::cluster::import_image_request::{FileStart, Manifest, Part};
use shoal_proto::cluster::{Image, ImportImageRequest, ListImagesRequest};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::client::{Client, Context};
use crate::error::CliError;
use crate::format;
use crate::image_source::ImageSource;
use crate::output::table;
use crate::page::Page;
use crate::view::ImageView;

/// Largest piece of a file in one message.
const CHUNK: usize = 1 << 20;
/// Pieces read ahead of the network.
const READ_AHEAD: usize = 4;

/// What to do with images.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Import an image: a directory with an image.toml, or a tar of one.
    Import(ImportArgs),
    /// List images.
    Ls(LsArgs),
}

/// Arguments of `image import`.
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// Directory or tar.
    pub path: PathBuf,
    /// A name for it; otherwise as its manifest says.
    #[arg(long)]
    pub name: Option<String>,
}

/// Arguments of `image ls`.
#[derive(Debug, Args)]
pub struct LsArgs {}

/// Imports or lists.
pub async fn run(context: &Context, command: ImageCommand) -> Result<(), CliError> {
    let mut client = context.client().await?;
    match command {
        ImageCommand::Import(args) => {
            let image = import(&mut client, &args.path, args.name.unwrap_or_default()).await?;
            context.output.show(&ImageView::from(&image), |image| {
                format!(
                    "imported {} ({}, {})",
                    image.name,
                    format::size(image.size_bytes),
                    image.digest
                )
            })
        }
        ImageCommand::Ls(LsArgs {}) => {
            let images = client
                .list_images(ListImagesRequest {})
                .await?
                .into_inner()
                .images;
            let images: Vec<ImageView> = images.iter().map(ImageView::from).collect();
            context.output.show(&images, |images| image_table(images))
        }
    }
}

/// Sends an image to the cluster; an empty name means the manifest's.
pub async fn import(client: &mut Client, path: &Path, name: String) -> Result<Image, CliError> {
    let source = ImageSource::open(path)?;
    let (sender, receiver) = mpsc::channel(READ_AHEAD);
    let reader = tokio::task::spawn_blocking(move || send(source, name, &sender));
    let answer = client.import_image(ReceiverStream::new(receiver)).await;
    // A file that cannot be read is the better explanation of a stream that ended early.
    match reader.await {
        Ok(Err(error)) => Err(error),
        _ => Ok(answer?.into_inner()),
    }
}

fn send(
    mut source: ImageSource,
    name: String,
    sender: &mpsc::Sender<ImportImageRequest>,
) -> Result<(), CliError> {
    let put = |part| {
        sender
            .blocking_send(ImportImageRequest { part: Some(part) })
            .is_ok()
    };
    if !put(Part::Manifest(Manifest {
        toml: source.manifest().to_owned(),
        name,
    })) {
        return Ok(());
    }
    for file in source.files() {
        if !put(Part::File(FileStart {
            name: file.name.clone(),
            size_bytes: file.size_bytes,
        })) {
            return Ok(());
        }
        let mut open = true;
        source.read(&file, CHUNK, |data| {
            open = put(Part::Data(data));
            open
        })?;
        if !open {
            return Ok(());
        }
    }
    Ok(())
}

pub(super) fn image_table(images: &[ImageView]) -> Page {
    table(
        ["NAME", "SIZE", "CPUS", "MEMORY", "KVM", "AGE", "DIGEST"],
        images.iter().map(|image| {
            [
                image.name.clone(),
                format::size(image.size_bytes),
                image.cpus.to_string(),
                format::size(image.memory_bytes),
                image.kvm.join(","),
                format::age(image.age_seconds),
                image.digest.chars().take(16).collect(),
            ]
        }),
    )
}
