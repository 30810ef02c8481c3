import { LsyncError, printable } from '@lsync/posix'

/** A directory is no OCI image layout, or what it says of an image makes no sense or is hostile. */
export class ImageInvalidError extends LsyncError {
  constructor(layout: string, why: string, cause?: unknown) {
    super('IMAGE_INVALID', `the image layout ${printable(layout)} is not valid: ${why}`, {
      path: layout,
      hint: 'fetch it again (skopeo copy … oci:DIR:NAME), and do not use it unless you trust where it comes from',
      cause,
    })
  }
}

/** A layout has no such image, or several and nobody said which. */
export class ImageNotFoundError extends LsyncError {
  constructor(layout: string, wanted: string, found: readonly string[]) {
    const known = found.length === 0 ? 'it has none' : `it has ${found.slice(0, 20).join(', ')}`
    super('IMAGE_NOT_FOUND', `the image layout ${printable(layout)} has no ${wanted}; ${known}`, {
      path: layout,
      hint: 'name one of these with --ref, or another platform with --platform',
    })
  }
}

/** The bytes of a blob are not those of its digest. Nothing of it was kept. */
export class BlobDamagedError extends LsyncError {
  constructor(layout: string, digest: string, why: string) {
    super('BLOB_DAMAGED', `the blob ${digest} of ${printable(layout)} is damaged: ${why}`, {
      path: layout,
      hint: 'fetch the image again',
    })
  }
}

/** Another process is adding an image to the layout. */
export class LayoutBusyError extends LsyncError {
  constructor(layout: string) {
    super('LAYOUT_BUSY', `another process writes to the image layout ${printable(layout)}`, {
      path: layout,
      hint: 'wait until it is done',
    })
  }
}
