//! ListImages.

use shoal_proto::cluster::ListImagesResponse;

use crate::scheduler::Scheduler;
use crate::view;

pub fn call(scheduler: &Scheduler) -> ListImagesResponse {
    ListImagesResponse {
        images: scheduler
            .images
            .list()
            .iter()
            .map(|image| view::image(image))
            .collect(),
    }
}
